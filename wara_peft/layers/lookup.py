"""Finds the layers, the config and the keys of an adapter in a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..base_layers.quantization import base_weight
from ..config import WaRAConfig
from ..config_fields.resolution import config_in_model, note_resolution
from ..forms import Target
from .base import TENSOR_PARTS, WaRALayer

AROUND = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.|$)")
"""Parts of a name or key that come from wrappers which PEFT has put around a module."""


def without_wrappers(name: str) -> str:
    """The name of a module or parameter, or a key, as it is without what PEFT has put around modules."""
    return AROUND.sub("", name)


def is_of_a_factor(key: str) -> bool:
    """Whether a key is that of a factor: it ends in a part's name, perhaps with an adapter's and a parameter's."""
    return any(part in TENSOR_PARTS for part in key.split(".")[-3:])


def base_model_of(model: nn.Module) -> nn.Module:
    """The model around whose layers adapters are, or the model itself if there are none."""
    return next((module.model for module in model.modules() if isinstance(module, BaseTuner)), model)


def modules_outside(model: nn.Module, wrappers: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, but for those that lie inside of a module of one of these classes."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside):
            yield name, module
            if isinstance(module, wrappers):
                inside += (f"{name}.",)


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, WaRALayer]:
    """The layers that have an adapter, tied ones included, by their names in `model`; without a name, any adapter."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, WaRALayer) and (adapter_name is None or adapter_name in module.wara_A)
    }


def saved_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """Keys under which PEFT saves an adapter's factors: names of modules in `model`, without the adapter's name."""
    return {
        f"{name}.{key}"
        for name, layer in adapted_layers(model, adapter_name).items()
        for key in layer.forms[adapter_name].saved(layer.parts(adapter_name))
    }


def fields_in_model(model: nn.Module, adapter_name: str) -> Mapping[str, Any]:
    """The fields of an adapter's config as a model has resolved them and found them out, as its layers have them."""
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
    """Keep in the layers of a new adapter the fields of its config as its model has resolved them and found them out.

    Args:
        model: the model with the adapter.
        adapter_name: the adapter's name.
        config: its config, resolved.
        written: the fields that a tuner resolves, as its user has written them.
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
    """The config of a model's WaRA adapter as this model has resolved it, in a copy.

    Raises:
        ValueError: there is none of that name.
        TypeError: it is no WaRA adapter.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}, only {', '.join(map(repr, configs)) or 'none'}.")
    config = configs[adapter_name]
    if not isinstance(config, WaRAConfig):
        raise TypeError(f"Adapter {adapter_name!r} is of type {config.peft_type.value}, not WARA.")
    return cast(WaRAConfig, config_in_model(config, fields_in_model(model, adapter_name)))


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, WaRALayer]:
    """The layers that hold an adapter, by the names that its config has for them; tied ones hold none."""
    layers = adapted_layers(model, adapter_name).values()
    return {layer.module_name: layer for layer in layers if adapter_name not in layer.tied_to}
