"""The largest singular values of a matrix, and their vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_singular(matrix: Tensor, count: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values, in descending order, with their vectors.

    If the count is far below the size, a randomised SVD computes them, with a seed of its own: the same matrix gives
    the same result. The random numbers that follow on the matrix's device do not change.

    Args:
        matrix: (m, n).
        count: number of singular values, at most min(m, n).
        exact: whether to take a full SVD in any case.

    Returns:
        U, (m, count), Σ, (count,), and V, (n, count), in the dtype of the matrix.
    """
    sampled = 2 * count + 8
    if exact or 8 * sampled > min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        v = vt.T
    else:
        # `fork_rng` restores the generators of the CPU and of the GPUs in the list; without a list, of all GPUs.
        with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=sampled, niter=6)
    return u[:, :count], s[:count], v[:, :count]
