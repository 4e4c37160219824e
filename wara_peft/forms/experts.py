"""The factor of the weights of many experts. Each expert has its own pair for every subband; all share a transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..wavelet import adjoint, least_squares, synthesis
from .factors import IN_DIM, SubbandFactor


class ExpertsFactor(SubbandFactor):
    """Coefficients of one side of all subbands of all experts; calling it gives Â or B̂ of every expert.

    One transform handles all experts: they are a further dimension, which `synthesis` leaves as it is.

    Args:
        wavelet, levels, length, ranks, dim: as in `SubbandFactor`. Each expert has these ranks.
        experts: number of experts E.

    Shapes:
        Parameter `level{j}`: (E, R_j, d_j) with `dim=1`, (E, d_j, R_j) with `dim=0`. Result: (E, R, length) or
        (E, length, R), in the parameters' dtype.
    """

    def __init__(
        self, wavelet: str, levels: int, length: int, ranks: Mapping[str, int], dim: int, experts: int
    ) -> None:
        self.experts = experts
        super().__init__(wavelet, levels, length, ranks, dim)

    def _empty(self, rank: int, size: int) -> nn.Parameter:
        shape = (rank, size) if self.dim == IN_DIM else (size, rank)
        return nn.Parameter(torch.empty(self.experts, *shape))

    @property
    def rank_dim(self) -> int:
        return super().rank_dim + 1

    def synthesis_of(self, coefficients: Sequence[Tensor | None]) -> Tensor:
        rows = [None if rows is None else self._as_rows(rows) for rows in coefficients]
        return self._by_expert(synthesis(rows, self.axis, IN_DIM)).contiguous()

    def adjoint(self, factor: Tensor) -> list[Tensor | None]:
        found = adjoint(self._as_rows(factor), self.axis, IN_DIM)
        return [None if rows is None else self._by_expert(rows) for rows in found]

    def nearest(self, factor: Tensor) -> list[Tensor | None]:
        found = least_squares(self._as_rows(factor), self.axis, IN_DIM)
        return [None if rows is None else self._by_expert(rows) for rows in found]

    def _as_rows(self, factors: Tensor) -> Tensor:
        """(R, d, E), for the transforms allow further dimensions only after rows."""
        return factors.permute((1, 2, 0) if self.dim == IN_DIM else (2, 1, 0))

    def _by_expert(self, rows: Tensor) -> Tensor:
        """The inverse of `_as_rows`."""
        return rows.permute((2, 0, 1) if self.dim == IN_DIM else (2, 1, 0))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"
