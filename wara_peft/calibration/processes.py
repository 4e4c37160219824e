"""Processes that work together through torch.distributed: their number, and values that are equal in all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def processes() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this process writes the files of all processes."""
    return processes() == 1 or dist.get_rank() == 0


def of_first_process(value: T) -> T:
    """Give the first process's value, which is copied to the others."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def take_from_first_process(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, in place, by those of the first process, so that all processes go on with equal values.

    Each could compute them by itself, but rounding may differ between machines.
    """
    if processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
