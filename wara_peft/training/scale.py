"""Scales adapters up or down for a while, as PEFT's `rescale_adapter_scale` does for LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..arguments import check_argument
from ..layers.lookup import adapted_layers


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Scope in which the scaling of all WaRA adapters is `multiplier` times what it was before.

    If the scaling of an adapter is changed inside the scope, by `set_scale` for example, the changed value stays after
    it. Adapters that are added or deleted inside stay added or deleted.

    `peft.helpers.rescale_adapter_scale` looks only for LoRA's layers, and refuses a model that has none. A multiplier
    in [0, 1] moves the model between the base and the adapted one, as WiSE-FT does.

    Args:
        model: a model with WaRA adapters, not merged.
        multiplier: the factor.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: the model has no WaRA adapters.
    """
    call = "rescale_adapter_scale(model, multiplier)"
    check_argument(call, "model", model, "an nn.Module")
    check_argument(call, "multiplier", multiplier, "a number")
    before = {layer: dict(layer.scaling) for layer in adapted_layers(model).values()}
    if not before:
        raise ValueError("The model has no WaRA adapters; for LoRA's there is peft.helpers.rescale_adapter_scale.")
    try:
        for layer, scaling in before.items():
            layer.scaling.update((name, value * multiplier) for name, value in scaling.items())
        yield
    finally:
        for layer, scaling in before.items():
            for name, value in scaling.items():
                # Another value was set inside the scope, or the adapter was deleted there.
                if layer.scaling.get(name) == value * multiplier:
                    layer.scaling[name] = value
