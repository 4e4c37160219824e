"""Components in an order of importance: what their tails are worth, the penalty on these, and which prefix to keep.

Source: hierarchical group lasso and progressive shrinking of Maestro, arXiv 2308.14929.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

TINY = 1e-12
"""Under roots, whose gradient is then finite at zero."""


def tail_sums(energies: Tensor) -> Tensor:
    """Σ_{i≥b} of the energies, for b = 0 … R − 1."""
    return energies.flip(0).cumsum(0).flip(0)


def group_lasso(found: Iterable[Tensor]) -> Tensor:
    """Σ_sides Σ_b ‖side[b:]‖_F, from the tails of squared norms of all sides of all layers."""
    total = sum((tail + TINY).sqrt().sum() for tail in found)
    assert isinstance(total, Tensor)
    return total


def prefix_above_threshold(rows: Tensor, columns: Tensor, threshold: float) -> int:
    """How long the longest prefix is with ‖A[b:]‖ · ‖B[:, b:]‖ ≥ threshold, from the tails of both sides."""
    return int(((rows * columns).sqrt() >= threshold).sum())


def moments_of(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> Iterator[Tensor]:
    """What an optimizer keeps of a parameter, number by number."""
    for value in optimizer.state.get(parameter, {}).values() if optimizer is not None else ():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            yield value
