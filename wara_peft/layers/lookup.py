"""Finds the layers, the config and the keys of an adapter in a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..arguments import check_unwrapped
from ..base_layers.quantization import base_weight
from ..config import WaRAConfig
from ..config_fields.resolution import config_in_model, note_resolution
from ..forms import Target
from .base import TENSOR_PARTS, WaRALayer

AROUND = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.|$)")
"""Finds the parts of a name or key that come from wrappers which PEFT has put around a module."""


def without_wrappers(name: str) -> str:
    """Return a name or key as it would be without the wrappers that PEFT has put around modules."""
    return AROUND.sub("", name)


def is_of_a_factor(key: str) -> bool:
    """Whether a key belongs to a factor: it ends in a part's name, maybe followed by an adapter's and parameter's."""
    return any(part in TENSOR_PARTS for part in key.split(".")[-3:])


def base_model_of(model: nn.Module) -> nn.Module:
    """Return the base model inside a model with adapters; a model without adapters is returned as it is."""
    return next((module.model for module in model.modules() if isinstance(module, BaseTuner)), model)


def modules_outside(model: nn.Module, wrappers: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules with their names, except those that lie inside of a module of one of these classes."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside):
            yield name, module
            if isinstance(module, wrappers):
                inside += (f"{name}.",)


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, WaRALayer]:
    """Find the layers with that adapter (None: with any), by their names in `model`; tied layers are included."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, WaRALayer) and (adapter_name is None or adapter_name in module.wara_A)
    }


def saved_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """Return the keys under which PEFT saves an adapter's factors: names in `model`, without the adapter's name."""
    return {
        f"{name}.{key}"
        for name, layer in adapted_layers(model, adapter_name).items()
        for key in layer.forms[adapter_name].saved(layer.parts(adapter_name))
    }


def fields_in_model(model: nn.Module, adapter_name: str) -> Mapping[str, Any]:
    """Return the values that the fields of an adapter's config have in a model, of which the layers keep a record."""
    for module in model.modules():
        if isinstance(module, WaRALayer) and adapter_name in module.in_model:
            return module.in_model[adapter_name]
    return {}


def note_fields(
    model: nn.Module,
    adapter_name: str,
    config: WaRAConfig,
    written: Mapping[str, Any],
) -> None:
    """Record, in the layers of a new adapter, the values that the fields of its config have in this model.

    Args:
        model: the model with the adapter.
        adapter_name: the adapter's name.
        config: its resolved config.
        written: the values of the user in the fields that a tuner resolves.
    """
    layers = layers_of(model, adapter_name)
    biased = [name for name, layer in layers.items() if getattr(layer, "bias", None) is not None]
    weights = {
        name: Target(layer.shape, partial(base_weight, layer.get_base_layer(), layer.quantization_backend))
        for name, layer in layers.items()
    }
    found = {
        "module_shapes": {name: layer.shape.as_list() for name, layer in layers.items()},
        "base_weight_hashes": config.form_object.base_weight_hashes(config, weights),
        "biased_modules": None if config.bias == "none" else biased,
    }
    in_model = note_resolution(config, written, found)
    for layer in adapted_layers(model, adapter_name).values():
        layer.in_model[adapter_name] = in_model


def wara_config(model: nn.Module, adapter_name: str) -> WaRAConfig:
    """Return a copy of an adapter's config, with the values that its fields have in this model.

    Raises:
        ValueError: the model has no adapter of that name.
        TypeError: the adapter is no WaRA adapter, or the model is wrapped.
    """
    check_unwrapped(model)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}, only {', '.join(map(repr, configs)) or 'none'}.")
    config = configs[adapter_name]
    if not isinstance(config, WaRAConfig):
        raise TypeError(f"Adapter {adapter_name!r} is of type {config.peft_type.value}, not WARA.")
    return cast(WaRAConfig, config_in_model(config, fields_in_model(model, adapter_name)))


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, WaRALayer]:
    """Find the layers that hold an adapter's own factors, by their names in its config. Tied layers hold none."""
    layers = adapted_layers(model, adapter_name).values()
    return {layer.module_name: layer for layer in layers if adapter_name not in layer.tied_to}
