"""`LowRankUpdate`, the ΔW of one module as a pair of factors, from which ΔW and its singular values are computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base_layers.kinds import Kind, ModuleShape
from ..linear_algebra.truncation import Decomposition, decompose
from ..wavelet import autocast_off


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = B̂ Â of one module, with the scaling inside B̂.

    Args:
        kind: the kind of the base layer.
        factor_a: Â, (R, n), or (R, n, *kernel) for a convolution, with n the in channels of one group.
        factor_b: scaling · B̂, (m, R).
        groups: number of groups of a convolution. Every group has the same Â and its own rows of B̂.
    """

    kind: Kind
    factor_a: Tensor
    factor_b: Tensor
    groups: int = 1

    @property
    def rank(self) -> int:
        return len(self.factor_a)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution, empty for other layers."""
        return tuple(self.factor_a.shape[2:])

    def to(self, device: torch.device | str, copy: bool = False) -> LowRankUpdate:
        """Return the update on a device; with `copy`, always in new memory."""
        return replace(
            self, factor_a=self.factor_a.to(device, copy=copy), factor_b=self.factor_b.to(device, copy=copy)
        )

    def __neg__(self) -> LowRankUpdate:
        return replace(self, factor_b=-self.factor_b)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ΔW in the shape and orientation in which a layer of this kind keeps its weight.

        Args:
            dtype: dtype of the result; None means that of the factors. The product is computed in the latter.
        """
        # Autocast would compute the product in half precision.
        with autocast_off([self.factor_a]):
            product = (self.factor_b @ self.factor_a.flatten(1)).to(dtype or self.factor_b.dtype)  # (m, n · kernel)
        if self.kind.keeps_in_first:
            return product.T
        return product.view(len(product), *self.factor_a.shape[1:])

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return, for each group, Â of shape (R, n · kernel) and the group's rows of B̂, (m / groups, R)."""
        return [(self.factor_a.flatten(1), rows) for rows in self.factor_b.chunk(self.groups)]

    def decomposition(self) -> list[Decomposition]:
        """Compute the thin singular value decomposition of each group's ΔW."""
        return [decompose(*pair) for pair in self.pairs()]


class ExpertsUpdate(LowRankUpdate):
    """ΔW_e = B̂_e Â_e of each expert e: Â of shape (experts, R, n), scaling · B̂ of shape (experts, m, R)."""

    @property
    def rank(self) -> int:
        """R of each expert."""
        return self.factor_a.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return ()

    def of_expert(self, expert: int) -> LowRankUpdate:
        """Return ΔW of one expert."""
        return LowRankUpdate(self.kind, self.factor_a[expert], self.factor_b[expert])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.stack([self.of_expert(expert).dense(dtype) for expert in range(len(self.factor_a))])

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return, for each expert e, Â_e of shape (R, n) and B̂_e of shape (m, R)."""
        return list(zip(self.factor_a, self.factor_b, strict=True))


def update_of(shape: ModuleShape, factor_a: Tensor, factor_b: Tensor) -> LowRankUpdate:
    """Make the update of a module of that shape from its factors Â and scaling · B̂."""
    if shape.experts:
        return ExpertsUpdate(shape.kind, factor_a, factor_b)
    return LowRankUpdate(shape.kind, factor_a, factor_b, shape.groups)
