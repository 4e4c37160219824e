"""Puts a model back as it was when merging fails half way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .experts import AdaptedModule, ParameterLayer


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Put base weights and adapter layers of the model back as they are now if the block raises."""
    saved = [_LayerState(module) for module in model.modules() if isinstance(module, BaseTunerLayer)]
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper, AdaptedModule))
    ]
    try:
        yield
    except BaseException:
        for parent, name, child in places:
            setattr(parent, name, child)
        for state in saved:
            state.restore()
        raise


class _LayerState:
    """What merging changes in one adapter layer, and how to put it back.

    Merging gives a parameter new data, so on the CPU the old data need no copy; elsewhere they are copied to main
    memory, for a device that holds the model need not hold it twice. Backends of quantized layers also replace
    parameters, or the whole base layer, and change what bitsandbytes keeps beside the weight; where accelerate has
    offloaded a weight, its hook holds the data.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.merged_adapters = list(layer.merged_adapters)
        self.inner = layer.base_layer
        self.base_layer = layer.bare.owner if isinstance(layer, ParameterLayer) else layer.get_base_layer()
        self.parameters = {
            name: (parameter, parameter.data if parameter.device.type in ("cpu", "meta") else parameter.data.cpu())
            for name, parameter in self.base_layer.named_parameters(recurse=False)
        }
        beside: list[Any] = [parameter for parameter, _ in self.parameters.values()]
        beside += [getattr(self.base_layer, name) for name in ("state", "_hf_hook") if hasattr(self.base_layer, name)]
        self.attributes = [(owner, dict(vars(owner))) for owner in beside]

    def restore(self) -> None:
        self.layer.base_layer = self.inner
        for name, (parameter, data) in self.parameters.items():
            parameter.data = data.to(parameter.device)
            setattr(self.base_layer, name, parameter)
        for owner, attributes in self.attributes:
            vars(owner).clear()
            vars(owner).update(attributes)
        self.layer.merged_adapters = self.merged_adapters
