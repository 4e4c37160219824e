"""The factor of the weights of many experts. Each expert has its own pair for every subband; all share a transform."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..wavelet import synthesis
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

    def synthesise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The factor of every expert, computed in `dtype`; None means the parameters' dtype."""
        # `synthesis` allows further dimensions only with `dim=1`, so columns of B̂ are transformed as rows.
        order = (1, 2, 0) if self.dim == IN_DIM else (2, 1, 0)  # to (R_j, d_j, E)
        rows = [None if rows is None else rows.to(dtype or rows.dtype).permute(order) for rows in self.coefficients()]
        result = synthesis(rows, self.axis, IN_DIM)  # (R, length, E)
        return result.permute((2, 0, 1) if self.dim == IN_DIM else (2, 1, 0)).contiguous()

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"
