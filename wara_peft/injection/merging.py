"""Checks before a model's adapters are merged into its weights, and takes merged adapters out again."""

from __future__ import annotations

import warnings

from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn

from ..compiled import plain_model
from ..layers.base import WaRALayer
from ..layers.lookup import adapted_layers
from ..messages import first_few
from .weight_tying import check_ties, check_token_ties


def check_merge(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Refuse a merge that is impossible, or after which the model would compute something else.

    All layers are checked before the first weight changes. One warning names quantized layers, whose weights are
    rounded after ΔW is added.

    Args:
        model: the model.
        adapter_names: the adapters to merge; None means the active ones.

    Raises:
        ValueError: an adapter has no ΔW; ΔW cannot be added to a weight; a weight cannot be written, or was changed
            after something was merged into it; or a weight is shared with a module that does not have the adapter.
    """
    merged: dict[str, list[str]] = {}
    quantized: list[str] = []
    with plain_model(model) as plain:
        for name, layer in adapted_layers(plain).items():
            adapters = list(layer.active_adapters if adapter_names is None else adapter_names)
            layer.check_has_delta_weight(adapters)
            own = [adapter for adapter in adapters if adapter in layer.wara_A]
            if own:
                merged[name] = adapters
                layer.check_mergeable(adapters)
            # A layer into which all of these are merged already is skipped: its weight will not be written.
            if not set(own) <= set(layer.merged_adapters):
                layer.check_not_written()
            backend = layer.quantization_backend
            if backend is not None and not set(own) <= set(layer.merged_adapters):
                quantized.append(repr(name))
            if backend is not None and not backend.supports_merge:
                raise ValueError(
                    f"Cannot merge into module {name!r}: {backend.backend_name} weights cannot be written. Serve the "
                    "adapter unmerged, or merge it into the unquantized model."
                )
        check_ties(plain, merged)
        check_token_ties(plain, adapter_names)
    if quantized:
        warnings.warn(
            f"Merging quantizes W + ΔW again in {first_few(quantized)}, which loses much of ΔW: to keep it, save the "
            "model and the adapter, and run `wara-peft merge --dequantize`."
        )


def unmerge(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Take adapters out of base weights.

    Arguments and errors are those of `WaRAModel.unmerge_adapter`.
    """
    # If adapters of several tuners lie around one layer, PEFT merges the outer ones first, so they come out last.
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)][::-1]
    for layer in layers:
        if isinstance(layer, WaRALayer) and not isinstance(layer.base_layer, BaseTunerLayer):
            layer.check_not_written()
    for layer in layers:
        # Layers of other methods cannot unmerge single adapters.
        if isinstance(layer, WaRALayer) or adapter_names is None:
            with onload_layer(layer):
                layer.unmerge(*([adapter_names] if isinstance(layer, WaRALayer) else []))
