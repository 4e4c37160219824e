"""The weight of a base layer as it was before adapters were merged into it, and whether it was written since."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .low_rank_update import LowRankUpdate

WORDS_IN_A_ROW = 1023
"""An odd number, so that all signs of a row changed at once change its sum, to which a sign adds 2^63."""


class Seal:
    """Sums of a tensor's bits, by which a later look finds out whether the tensor still has the same values.

    Version counters would not tell: writes through `.data` go past them, and a move to another device looks like one.

    Args:
        tensors: the tensors, on any device.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.dtypes = [tensor.dtype for tensor in tensors]
        self.sums = _sums(tensors)

    def is_on(self, tensors: list[Tensor]) -> bool:
        """Whether the tensors have these bits, or are on the meta device, where none can be seen."""
        if any(tensor.is_meta for tensor in tensors):
            return True
        if self.dtypes != [tensor.dtype for tensor in tensors]:
            return False
        found = _sums(tensors)
        return len(found) == len(self.sums) and all(map(torch.equal, found, self.sums))


def _sums(tensors: list[Tensor]) -> list[Tensor]:
    """Sums of the 8-byte words of each tensor, modulo 2^64, by rows and by columns, and the bytes that fill no row."""
    found = []
    for part in (part for tensor in tensors for part in _plain_parts(tensor) if not part.is_meta):
        content = part.detach().contiguous().flatten().view(torch.uint8)
        if content.storage_offset() % 8:
            content = content.clone()
        end = len(content) - len(content) % (8 * WORDS_IN_A_ROW)
        rows = content[:end].view(torch.int64).view(-1, WORDS_IN_A_ROW)
        found += [rows.sum(0).cpu(), rows.sum(1).cpu(), content[end:].clone().cpu()]
    return found


def _plain_parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors inside of a tensor that is sharded, or quantized by a subclass of `torch.Tensor`."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(tensor, name))


class KeptWeight:
    """A weight as it is now, to be put back to the bit later.

    Merging gives a parameter new data, so on the CPU the old data need no copy; from elsewhere they are copied to main
    memory, for a device that holds the model need not hold it twice. Backends of quantized layers also replace the
    parameter, or the whole base layer, and change what bitsandbytes keeps beside the weight.

    Args:
        layer: the adapter layer whose base layer has the weight.

    Attributes:
        updates: what has been merged into the weight since, by the adapter's name, in main memory.
        seal: tells whether anybody else wrote the weight since.
    """

    def __init__(self, layer: Any) -> None:
        owner, name = layer.weight_place()
        weight = getattr(owner, name)
        self.data: Tensor = weight.data
        self.updates: dict[str, LowRankUpdate] = {}
        self.seal: Seal | None = None
        self.objects: _QuantizedObjects | None = None
        if layer.quantization_backend is not None:
            self.objects = _QuantizedObjects(layer.base_layer, weight, getattr(owner, "state", None))

    def restore(self, layer: Any) -> None:
        """Put the weight back, on the device on which the layer's weight is now."""
        owner, name = layer.weight_place()
        weight = getattr(owner, name)
        data = self.data.to(weight.device)
        if self.objects is None:
            weight.data = data
            return
        layer.base_layer = self.objects.base_layer
        owner = layer.weight_place()[0]
        setattr(owner, name, self.objects.restored(data))
        if hasattr(owner, "quant_state"):
            owner.quant_state = self.objects.weight.quant_state  # type: ignore[attr-defined]

    def to_main_memory(self) -> None:
        """Let go of what lies on another device."""
        if self.data.device.type not in ("cpu", "meta"):
            self.data = self.data.cpu()
            if self.objects is not None:
                self.objects.to_main_memory(self.data)

    def cast(self, dtype: torch.dtype) -> None:
        """Cast the weight as the layer's has been cast."""
        self.data = self.data.to(dtype)


class _QuantizedObjects:
    """Keeps what a quantized layer has beside the data of its weight: the parameter itself, and its statistics.

    Args:
        base_layer: what the adapter layer has as its base layer.
        weight: the parameter.
        state: where bitsandbytes keeps the statistics of 8-bit weights in use.
    """

    def __init__(self, base_layer: nn.Module, weight: nn.Parameter, state: Any) -> None:
        self.base_layer, self.weight, self.state = base_layer, weight, state
        self.of_weight = dict(vars(weight))
        self.of_state = {} if state is None else dict(vars(state))

    def restored(self, data: Tensor) -> nn.Parameter:
        """The parameter with these data and all that belongs to it, on their device."""
        for owner, attributes in ((self.weight, self.of_weight), (self.state, self.of_state)):
            if owner is not None:
                vars(owner).clear()
                vars(owner).update(_on(data.device, attributes))
        self.weight.data = data
        return self.weight

    def to_main_memory(self, data: Tensor) -> None:
        self.of_weight, self.of_state = _on(data.device, self.of_weight), _on(data.device, self.of_state)
        vars(self.weight).clear()
        self.weight.data = data


def _on(device: torch.device, attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes with tensors and bitsandbytes' `QuantState`, which moves itself in place, on a device."""
    moved = dict(attributes)
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device)
        elif hasattr(value, "absmax"):
            value.to(device)
    return moved
