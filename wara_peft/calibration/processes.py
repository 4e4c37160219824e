"""Processes that work together through torch.distributed: their number, and values that are equal in all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def take_from_first_process(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, in place, by those of the first process, so that all processes go on with equal values.

    Each could compute them by itself, but rounding may differ between machines.
    """
    if processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
