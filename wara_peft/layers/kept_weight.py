"""Keeps a base layer's weight as it was before adapters were merged into it, and tells if it was written since."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .low_rank_update import LowRankUpdate

WORDS_IN_A_ROW = 1023
"""Words that are summed together. A change of sign adds 2^63 to a word, and two such changes cancel in a sum modulo
2^64. The number is odd, so that changing all signs of a row changes its sum."""


class Seal:
    """Keeps sums of tensors' bits, to find out later whether the tensors still have the same values.

    PyTorch's version counters would not tell: they miss writes through `.data`, and count a move to another device.

    Args:
        tensors: the tensors, on any device.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.dtypes = [tensor.dtype for tensor in tensors]
        self.sums = _sums(tensors)

    def is_on(self, tensors: list[Tensor]) -> bool:
        """Whether the tensors still have the same bits. On the meta device there are none to compare: True."""
        if any(tensor.is_meta for tensor in tensors):
            return True
        if self.dtypes != [tensor.dtype for tensor in tensors]:
            return False
        found = _sums(tensors)
        return len(found) == len(self.sums) and all(map(torch.equal, found, self.sums))


def _sums(tensors: list[Tensor]) -> list[Tensor]:
    """Sum the 8-byte words of each tensor by rows and by columns, modulo 2^64; bytes that fill no row are copied."""
    found = []
    for part in (part for tensor in tensors for part in _plain_parts(tensor) if not part.is_meta):
        content = part.detach().contiguous().flatten().view(torch.uint8)
        if content.storage_offset() % 8:  # PyTorch views bytes as words only where a word may begin
            content = content.clone()
        end = len(content) - len(content) % (8 * WORDS_IN_A_ROW)
        rows = content[:end].view(torch.int64).view(-1, WORDS_IN_A_ROW)
        found += [rows.sum(0).cpu(), rows.sum(1).cpu(), content[end:].clone().cpu()]
    return found


def _plain_parts(tensor: Any) -> Iterator[Tensor]:
    """Yield the plain tensors inside of a sharded tensor, or of a quantized one that is a subclass of `Tensor`."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(tensor, name))


class KeptWeight:
    """Keeps a weight as it is now, to put it back to the bit later.

    Merging gives a parameter new data instead of writing into the old. So on the CPU the old data need no copy. From
    another device they are moved to main memory, since that device may have no room for the model twice. Backends of
    quantized layers also replace the parameter, or the whole base layer, and change statistics that bitsandbytes keeps
    beside the weight. These are kept as well.

    Args:
        layer: the adapter layer whose base layer has the weight.

    Attributes:
        updates: the ΔW that have been merged into the weight since, by the adapter's name, in main memory.
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
        owner = layer.weight_place()[0]  # the line above may have changed it
        setattr(owner, name, self.objects.restored(data))
        if hasattr(owner, "quant_state"):
            owner.quant_state = self.objects.weight.quant_state  # type: ignore[attr-defined]

    def to_main_memory(self) -> None:
        """Move the weight to main memory, so that it takes no memory on another device."""
        if self.data.device.type not in ("cpu", "meta"):
            self.data = self.data.cpu()
            if self.objects is not None:
                self.objects.to_main_memory(self.data)

    def cast(self, dtype: torch.dtype) -> None:
        """Cast the kept weight, after the layer's own has been cast."""
        self.data = self.data.to(dtype)


class _QuantizedObjects:
    """Keeps the objects that a quantized layer has besides the data of its weight: the parameter and its statistics.

    Args:
        base_layer: the attribute `base_layer` of the adapter layer.
        weight: the parameter.
        state: where bitsandbytes keeps the statistics of an 8-bit weight that is in use; None for other layers.
    """

    def __init__(self, base_layer: nn.Module, weight: nn.Parameter, state: Any) -> None:
        self.base_layer, self.weight, self.state = base_layer, weight, state
        self.of_weight = dict(vars(weight))
        self.of_state = {} if state is None else dict(vars(state))

    def restored(self, data: Tensor) -> nn.Parameter:
        """Return the parameter with these data, and with its statistics on the same device."""
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
    """Return attributes with their tensors on a device. A `QuantState` of bitsandbytes is moved in place."""
    moved = dict(attributes)
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device)
        elif hasattr(value, "absmax"):  # it is a `QuantState`; bitsandbytes need not be installed
            value.to(device)
    return moved
