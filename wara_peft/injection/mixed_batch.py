"""Runs batches in which each sample has its own adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..forms import factors_of_one_call
from ..layers.base import WaRALayer
from ..layers.lookup import adapted_layers
from ..layers.parameters import ParameterLayer
from ..messages import first_few


@contextmanager
def mixed_batch(tuner: BaseTuner, adapter_names: list[str], beams: int) -> Iterator[None]:
    """Scope in which every adapter layer is told, at each call, which adapter each sample of the batch uses.

    Args:
        tuner: the tuner around the model.
        adapter_names: the adapter's name for each sample, or "__base__" for no adapter.
        beams: how often beam search repeats each sample; an encoder runs before it repeats them.

    Raises:
        ValueError: the model is training, no layer has an adapter of one of these names, or bare parameters are
            adapted.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = adapted_layers(tuner).values()
    known = {"__base__"}.union(*(layer.wara_A.keys() for layer in layers))
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    parameters = [layer.module_name for layer in layers if isinstance(layer, ParameterLayer)]
    if parameters:
        raise ValueError(
            f"Cannot pass `adapter_names` to a model with adapted parameters ({first_few(parameters)}), which are the "
            "same for all samples of a batch. Activate one adapter by `set_adapter`, and run a batch for each."
        )
    # Beam search repeats a sample in consecutive rows.
    repeated = [name for name in adapter_names for _ in range(beams)]
    encoder = getattr(tuner.model, "get_encoder", lambda: None)()
    in_encoder = set() if encoder in (None, tuner.model) else set(encoder.modules())
    # Layers are called by the model, which passes no `adapter_names` on, so hooks add them to every layer's call.
    handles = []
    try:
        for module in tuner.modules():
            if isinstance(module, (WaRALayer, AuxiliaryTrainingWrapper)):
                names = list(adapter_names) if module in in_encoder else repeated
                if isinstance(module, AuxiliaryTrainingWrapper):
                    # PEFT looks every name up there, also that of an adapter that trains no copy or tokens of this
                    # module, and so leaves it as it is.
                    names = [name if name in module._adapters else "__base__" for name in names]
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        # `generate` runs many forwards in one call, and weights stay the same meanwhile, so factors may be kept.
        with factors_of_one_call(tuner):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
