"""Several processes that work together: how many there are, and values on which they agree to the last bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def take_from_first_process(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, in place, by those of the first process; rounding may differ between machines."""
    if processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
