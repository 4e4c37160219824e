"""A LoRA of a live model's WaRA adapter that can be refreshed in place.

Its tensors stay the same objects; `refresh` copies the adapter's present values into them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..arguments import check_argument
from ..base_layers.lora_places import lora_name
from ..compiled import on_plain_model
from ..disk.adapters.contents import PEFT_PREFIX
from ..disk.adapters.source import adapter_source
from ..disk.checkpoints.directory import written_at_once
from ..layers.as_lora import LoraModule
from ..layers.base import WaRALayer
from ..layers.lookup import adapted_layers
from .export import to_lora, write_lora


@dataclass(frozen=True)
class _Place:
    """One layer's part of a view.

    Attributes:
        layer: the adapted layer in the model.
        rank: the layer's rank when the view was made. The tensors may be padded to a larger common rank.
        tensors: the view's tensors for this layer, A and B, by PEFT's keys.
    """

    layer: WaRALayer
    rank: int
    tensors: dict[str, Tensor]


class LoraView:
    """The exact LoRA of a live WaRA adapter; `lora_view` makes it.

    Attributes:
        config: the `LoraConfig`, with r = lora_alpha = R, so that LoRA's scaling is 1.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self._model = model
        self._adapter_name = adapter_name
        source = adapter_source(model, adapter_name)
        self.config, tensors = to_lora(model, None, adapter_name)
        # Tensors that train in full are the model's own ones here. Copies keep the values of the last refresh.
        self._others = {key: tensors[key].clone() for key in source.others}
        self._tensors = tensors | self._others
        self._places: dict[str, _Place] = {}
        for name, layer in adapted_layers(model).items():
            name = name.removeprefix(PEFT_PREFIX)
            if name in source.modules:
                keys = [f"{PEFT_PREFIX}{lora_name(source.modules, name)}.{key}" for key in layer.kind.lora_names]
                own = {key: tensors[key] for key in keys}
                self._places[name] = _Place(layer, layer.total_rank(adapter_name), own)

    def state_dict(self) -> dict[str, Tensor]:
        """Give the LoRA as of the last refresh, with PEFT's keys; every call gives the same tensors."""
        return dict(self._tensors)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the adapter's present values into the view's tensors.

        lora_A = Â and lora_B = scaling · B̂, as in `to_lora`. They are not checked to be finite, because a check would
        wait for the device. Modules trained in full, biases and tokens are refreshed too.

        Nothing is allocated for adapters of `form="subband"` in float32 or better on linear layers and embeddings
        whose axes 2^L divides. In all other cases one factor at a time is made and copied.

        Raises:
            RuntimeError: the adapter was deleted, or has another rank now. The view is as it was.
        """
        for name, place in self._places.items():
            adapters = place.layer.wara_A
            if self._adapter_name not in adapters or place.layer.total_rank(self._adapter_name) != place.rank:
                raise RuntimeError(
                    f"Adapter {self._adapter_name!r} is not there any more in module {name!r}, or not with its rank "
                    f"of {place.rank}. Make a new view with lora_view(model, {self._adapter_name!r})."
                )
        # All layers are checked before the first is written, so that a refused refresh leaves the view as it was.
        for name, place in self._places.items():
            self._write(name, place)
        if self._others:
            for key, value in adapter_source(self._model, self._adapter_name).others.items():
                self._others[key].copy_(value)

    def _write(self, name: str, place: _Place) -> None:
        layer, (lora_a, lora_b) = place.layer, place.tensors.values()
        # PEFT lays out the factors of grouped convolutions and of experts differently, which LoraModule knows.
        if layer.shape.kernel or layer.kind.is_parameter:
            update = layer.low_rank_update(self._adapter_name)
            values = LoraModule.of(name, update, None).tensors(self.config.r, lora_a.dtype)
            for target, value in zip((lora_a, lora_b), values.values(), strict=True):
                target.copy_(value)
            return
        factor_a, factor_b = layer.factors(self._adapter_name)
        factor_a.synthesise_into(lora_a[: place.rank])
        # Rows and columns beyond the layer's rank are padding, and have been zero from the start.
        columns = lora_b[:, : place.rank]
        factor_b.synthesise_into(columns)
        columns.mul_(layer.scaling[self._adapter_name])

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Save the LoRA as of the last refresh as a checkpoint that PEFT, and engines that serve LoRA, load.

        The directory is made if it does not exist. Both files appear only when they are complete.

        Raises:
            ValueError: the path is a file.
        """
        with written_at_once(save_directory, existing="update") as directory:
            write_lora(directory, self.config, self._tensors)


@on_plain_model
def lora_view(model: nn.Module, adapter_name: str = "default") -> LoraView:
    """Make the exact LoRA of a live WaRA adapter, which is refreshed in place, for example after each optimizer step.

    lora_A = Â of shape `(R, n, *kernel)` and lora_B = scaling · B̂ of shape (m, R), as in `to_lora`. The view keeps its
    tensors: a user of its state dict (a hotswap, an engine for rollouts, a CUDA graph) sees the new values after
    `refresh()`. The view does not change the model, which may go on training.

    Args:
        model: a model with WaRA adapters, from `get_peft_model` or with adapters added by transformers.
        adapter_name: the adapter.

    Raises:
        ValueError: the model has no adapter of that name, or it has no ΔW (`form="grid"`).
        TypeError: the adapter is not a WaRA adapter, or `model` is no model; a path is for `to_lora`.

    Example:
        >>> view = wara_peft.lora_view(model)  # doctest: +SKIP
        >>> for batch in batches:  # doctest: +SKIP
        ...     step(model, batch)
        ...     view.refresh()
        ...     engine.load(view.config, view.state_dict())
    """
    if isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model={model!r} must be a model with WaRA adapters; to_lora reads directories.")
    check_argument("lora_view(model, adapter_name)", "model", model, "an nn.Module")
    return LoraView(model, adapter_name)
