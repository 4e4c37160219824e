"""Restores a model if merging fails half way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..layers.merging import MergingLayer
from ..layers.parameters import AdaptedModule


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the base weights and adapter layers of the model to their present state if the block raises.

    WaRA's layers can unmerge to the last bit. Layers of other methods cannot, so their weights are copied beforehand.
    """
    ours = [module for module in model.modules() if isinstance(module, MergingLayer)]
    merged_before = [list(layer.merged_adapters) for layer in ours]
    saved = [
        _LayerState(module)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MergingLayer)
    ]
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper, AdaptedModule))
    ]
    try:
        yield
    except BaseException:  # also Ctrl-C
        # `merge_and_unload` may already have replaced adapter layers by their base layers.
        for parent, name, child in places:
            setattr(parent, name, child)
        for layer, before in zip(ours, merged_before, strict=True):
            new = [name for name in layer.merged_adapters if name not in before]
            if new:
                with onload_layer(layer):
                    layer.unmerge(new)
            _offload(layer.get_base_layer())
        for state in saved:
            state.restore()
        raise


def _offload(base_layer: nn.Module) -> None:
    """Offload the weight of a layer again if it was loaded for merging and merging failed before it was offloaded."""
    hook = getattr(base_layer, "_hf_hook", None)
    if getattr(hook, "offload", False) and not any(parameter.is_meta for parameter in base_layer.parameters()):
        # accelerate's hook offloads after a forward; it returns the output that it is given, here an empty one.
        hook.post_forward(base_layer, torch.tensor([]))  # type: ignore[union-attr]


class _LayerState:
    """Keeps everything that merging changes in an adapter layer of another method, in order to restore it.

    Merging may add to a weight in place, so the values are copied to main memory. A weight that accelerate has
    offloaded has no values here: its hook holds them.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.merged_adapters = list(layer.merged_adapters)
        self.inner = layer.base_layer
        self.base_layer = layer.get_base_layer()
        self.parameters = {
            name: (parameter, parameter.data if parameter.is_meta else parameter.data.to("cpu", copy=True))
            for name, parameter in self.base_layer.named_parameters(recurse=False)
        }
        # Quantized weights, bitsandbytes' layers (`state`) and accelerate's hooks keep further values as attributes.
        beside: list[Any] = [parameter for parameter, _ in self.parameters.values()]
        beside += [getattr(self.base_layer, name) for name in ("state", "_hf_hook") if hasattr(self.base_layer, name)]
        self.attributes = [(owner, dict(vars(owner))) for owner in beside]

    def restore(self) -> None:
        self.layer.base_layer = self.inner
        # The same parameter objects come back, to which optimizers and tied modules may refer.
        for name, (parameter, data) in self.parameters.items():
            parameter.data = data.to(parameter.device)
            setattr(self.base_layer, name, parameter)
        for owner, attributes in self.attributes:
            vars(owner).clear()
            vars(owner).update(attributes)
        self.layer.merged_adapters = self.merged_adapters
