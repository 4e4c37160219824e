"""Moments XᵀX of the inputs X of layers, summed up over batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class _Moment:
    """One moment XᵀX for all layers that get the same tensor right after each other, as q, k and v do.

    The first of these layers leads, and the others follow it. XᵀX is computed when the leader is called.

    Attributes:
        leader: the layer that leads.
        total: the sum over all calls of the leader.
        latest: the part of `total` that the leader's last call added.
        calls: number of calls of the leader.
        followed: the layers that were called with the leader's last input after it.
    """

    leader: nn.Module
    total: Tensor | float = 0.0
    latest: Tensor | float = 0.0
    calls: int = 0
    followed: set[nn.Module] = field(default_factory=set)


class Moments:
    """Moments XᵀX of the inputs X, of shape (N, n), of layers. Positions that a batch's mask leaves out do not count.

    Args:
        model: the model that has the layers.
        with_mean: whether X gets a column of ones at the right. The last row of XᵀX then holds the sums over the
            inputs and their number.
    """

    def __init__(self, model: nn.Module, with_mean: bool = False) -> None:
        self.with_mean = with_mean
        self.encoder = _encoder(model)
        self._in_encoder = set() if self.encoder is None else set(self.encoder.modules())
        self._of: dict[nn.Module, _Moment] = {}
        self._latest: tuple[Tensor, _Moment] | None = None
        self._mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._encoded: Tensor | None = None

    @contextmanager
    def watching(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Context in which each call of a layer adds its input to the moments, and the encoder's output is kept."""
        handles = [layer.register_forward_pre_hook(self.add) for layer in layers]
        if self.encoder is not None:
            handles.append(self.encoder.register_forward_hook(self.keep_encoded))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start_batch(self, kwargs: Mapping[str, Any]) -> None:
        self._latest = None
        self._mask, self._decoder_mask = (
            mask if isinstance(mask := kwargs.get(name), Tensor) else None
            for name in ("attention_mask", "decoder_attention_mask")
        )
        encoded = kwargs.get("encoder_outputs")
        self._encoded = None if encoded is None else encoded[0]

    def keep_encoded(self, encoder: nn.Module, args: Any, output: Any) -> None:
        self._encoded = output if isinstance(output, Tensor) else output[0]

    def add(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs: Tensor = args[0]
        moment = self._of.get(layer)
        # `_latest` holds the tensor, so no other tensor can take its place in memory and be mistaken for it.
        if self._latest is not None and self._latest[0] is inputs:
            latest = self._latest[1]
            # A new layer joins only after the leader's first call: it has not seen the inputs of earlier ones.
            joins = moment is None and latest.calls == 1
            if joins or (moment is latest and layer is not latest.leader):
                self._of[layer] = latest
                latest.followed.add(layer)
                return
        if moment is None:
            moment = self._of[layer] = _Moment(layer)
        elif layer is not moment.leader:
            moment = self._leave(layer)
        # The next call of the leader adds an input that these layers have not been given.
        self._let_go(moment)
        rows = self._counted(layer, inputs)
        moment.latest = rows.T @ rows
        moment.total = moment.total + moment.latest
        moment.calls += 1
        moment.followed.clear()
        self._latest = inputs, moment

    def _leave(self, layer: nn.Module) -> _Moment:
        """Let a layer stop following: it gets its own moment, the sum over the inputs that it has seen."""
        shared = self._of[layer]
        seen = shared.total if layer in shared.followed else shared.total - shared.latest
        own = self._of[layer] = _Moment(layer, seen, calls=shared.calls)
        return own

    def _let_go(self, moment: _Moment) -> None:
        """Make the layers leave that did not follow the leader's last call."""
        for layer, other in list(self._of.items()):
            if other is moment and layer is not moment.leader and layer not in moment.followed:
                self._leave(layer)

    def _counted(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """The inputs at all positions that count, as rows of a matrix, in float32 or better."""
        counting = self.counting(layer, inputs)
        if counting is not None:
            inputs = inputs[counting]
        rows = inputs.reshape(-1, inputs.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return torch.cat((rows, rows.new_ones(len(rows), 1)), 1) if self.with_mean else rows

    def counting(self, layer: nn.Module, inputs: Tensor) -> Tensor | None:
        """A boolean for each position of a layer's input: whether it counts. None if all count."""
        # Layers of a decoder see the decoder's tokens, but for keys and values of its cross-attention: these see the
        # encoder's output, so the encoder's mask is theirs.
        mask = self._mask
        if self.encoder is not None and layer not in self._in_encoder and not self._is_encoded(inputs):
            mask = self._decoder_mask
        return mask.bool() if mask is not None and mask.shape == inputs.shape[:-1] else None

    def _is_encoded(self, inputs: Tensor) -> bool:
        # Models may pass on a view of the encoder's output, which is another object over the same memory.
        encoded = self._encoded
        return encoded is not None and inputs.shape == encoded.shape and inputs.data_ptr() == encoded.data_ptr()

    def of_layers(self) -> dict[nn.Module, Tensor]:
        for moment in set(self._of.values()):
            self._let_go(moment)
        return {layer: cast(Tensor, moment.total) for layer, moment in self._of.items()}


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model, or None."""
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return None
    encoder = base.get_encoder()  # transformers gives the model itself if it finds no encoder in it
    return None if encoder is base else cast(nn.Module, encoder)
