"""The largest singular values of a matrix, and their vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_singular(matrix: Tensor, count: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values, in descending order, with their vectors.

    Where the count is far below the size they come from a randomised SVD, whose random numbers are its own: the same
    matrix gives the same result, and no other random number changes.

    Args:
        matrix: (m, n).
        count: how many; no more than there are.
        exact: take a full SVD in any case.

    Returns:
        U, (m, count), Σ, (count,), and V, (n, count), in the dtype of the matrix.
    """
    sampled = 2 * count + 8
    if exact or 8 * sampled > min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        v = vt.T
    else:
        with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=sampled, niter=6)
    return u[:, :count], s[:count], v[:, :count]
