"""The largest singular values of a matrix, and their vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_singular(matrix: Tensor, count: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values, in descending order, with their vectors.

    If the count is far below the size, a randomised SVD computes them, from random numbers of its own: the same matrix
    gives the same result, and no other random number of any device changes.

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
        u, s, v = randomised_svd(matrix, sampled)
    return u[:, :count], s[:count], v[:, :count]


def randomised_svd(matrix: Tensor, sampled: int, iterations: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Approximations of the largest singular values, with their vectors, from the range of A Ω for a random Ω.

    It computes what `torch.svd_lowrank` does after `torch.manual_seed(0)`, which would seed all devices.
    Source: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.

    Args:
        matrix: A, (m, n).
        sampled: number of columns of Ω, which is more than the singular values that are wanted.
        iterations: how often A and Aᵀ are applied, for an accurate range.

    Returns:
        U, (m, sampled), Σ, (sampled,), and V, (n, sampled).
    """
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix
    generator = torch.Generator(tall.device).manual_seed(0)
    omega = torch.randn(tall.shape[1], sampled, generator=generator, dtype=tall.dtype, device=tall.device)
    basis = torch.linalg.qr(tall @ omega).Q  # of the range of A Ω
    for _ in range(iterations):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    left, s, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    u, v = basis @ left, right.T
    return (v, s, u) if is_wide else (u, s, v)
