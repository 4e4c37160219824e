"""Components in an order of importance: energies of their tails, a penalty on tails, and the prefix that is kept.

The tail b of R components is those from b on; the prefix b is the first b of them.

Source: hierarchical group lasso and progressive shrinking of Maestro, arXiv 2308.14929.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

TINY = 1e-12
"""Is added under roots: the gradient of a root is infinite at zero."""


def tail_sums(energies: Tensor) -> Tensor:
    """Σ_{i≥b} of the energies, for b = 0 … R − 1."""
    return energies.flip(0).cumsum(0).flip(0)


def group_lasso(found: Iterable[Tensor]) -> Tensor:
    """Σ_sides Σ_b ‖side[b:]‖_F, from the `tail_sums` of squared norms, one tensor for each factor of each layer."""
    total = sum((tail + TINY).sqrt().sum() for tail in found)
    assert isinstance(total, Tensor)
    return total


def prefix_above_threshold(rows: Tensor, columns: Tensor, threshold: float) -> int:
    """Number of components b with ‖A[b:]‖ · ‖B[:, b:]‖ ≥ threshold, from the `tail_sums` of both factors.

    Tails only shrink as b grows, so these components are a prefix.
    """
    return int(((rows * columns).sqrt() >= threshold).sum())


def moments_of(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> Iterator[Tensor]:
    """The tensors of an optimizer's state that hold one number for each number of a parameter, such as moments."""
    for value in optimizer.state.get(parameter, {}).values() if optimizer is not None else ():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            yield value
