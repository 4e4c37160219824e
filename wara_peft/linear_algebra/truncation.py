"""Singular values of a product of two factors, and its truncation to a lower rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """ΔW = left · diag(values) · right, in float64 on the CPU: (m, k), (k,) in descending order, (k, n)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """The pair (A, B) of shapes (rank, n) and (m, rank) whose product B A is nearest to ΔW in the Frobenius norm.

        Each of the two takes the root of every singular value. Rows and columns beyond the rank of ΔW are zero.
        """
        roots = self.values[:rank].sqrt()
        factor_a = self.left.new_zeros(rank, self.right.shape[1])
        factor_b = self.left.new_zeros(len(self.left), rank)
        factor_a[: len(roots)] = roots[:, None] * self.right[:rank]
        factor_b[:, : len(roots)] = self.left[:, :rank] * roots
        return factor_a, factor_b


def decompose(factor_a: Tensor, factor_b: Tensor) -> Decomposition:
    """Singular value decomposition of factor_b · factor_a by QR of either factor and an SVD of the R × R core.

        Aᵀ = Q_a R_a,   B = Q_b R_b,   R_b R_aᵀ = U Σ Vᵀ,   so   B A = (Q_b U) Σ (Q_a V)ᵀ

    It costs O((m + n) R²); the (m, n) product is not built.

    Args:
        factor_a: (R, n).
        factor_b: (m, R).
    """
    q_a, r_a = torch.linalg.qr(factor_a.detach().double().cpu().T)
    q_b, r_b = torch.linalg.qr(factor_b.detach().double().cpu())
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Decomposition(q_b @ left, values, right @ q_a.T)


def rank_for_energy(decompositions: Sequence[Decomposition], share: float) -> int:
    """Smallest rank, the same for all groups of a module, whose truncation keeps this share of ‖ΔW‖²."""
    squares = sum(part.values.square() for part in decompositions)
    assert isinstance(squares, Tensor)
    kept = squares.cumsum(0)
    # The sum is rounded; without this margin, share=1 could ask for ranks that hold only rounding errors.
    short_of_it = kept < share * kept[-1] * (1 - torch.finfo(kept.dtype).eps * len(kept))
    return min(int(short_of_it.sum()) + 1, len(kept))


def truncation_energy(decompositions: Sequence[Decomposition], rank: int) -> tuple[float, float]:
    """‖ΔW − truncation‖² and ‖ΔW‖² of a module if each of its groups is truncated to this rank."""
    lost = sum(float(part.values[rank:].square().sum()) for part in decompositions)
    return lost, sum(float(part.values.square().sum()) for part in decompositions)
