"""A linear layer in blocks of rows, each a dense basis times sparse coefficients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .sparse_rows import SparseRows, check_nonzeros, pack_bits


class DenseSparseLinear(SparseRows):
    """A linear layer whose weight consists of blocks of p rows, W_b = D_b S_b.

    The basis D_b, (p, k), is dense. Each column of the coefficients S_b, (k, n), has s values, and zeros elsewhere.
    There are m k + (m/p) n s numbers and (m/p) n ⌈k/8⌉ bytes for places, where W has m n numbers. Each forward makes
    the coefficients dense again. Source: Chand et al., "DSFormer", arXiv 2312.13211.

    Args:
        in_features: n.
        out_features: m.
        block: p, number of rows of a block, a divisor of m.
        atoms: k, number of columns of a basis.
        nonzeros: s, number of values in each column of coefficients, at most k.
        bias: whether the layer has a bias b.
        device, dtype: as in `nn.Linear`.

    Attributes:
        bases: D_b of all blocks, (m/p, p, k).
        values: (m/p · n, s), the values of each column of each S_b, from top to bottom.
        support: (m/p · n, ⌈k/8⌉) bytes; bit j % 8 of byte j // 8 says whether there is a value in row j.

    Raises:
        ValueError: `block`, `atoms` or `nonzeros` is out of its range.
    """

    sizes: ClassVar[tuple[str, ...]] = ("block", "atoms", "nonzeros")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: int,
        atoms: int,
        nonzeros: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if block < 1 or out_features % block:
            raise ValueError(f"block={block} must divide the {out_features} outputs.")
        check_nonzeros(nonzeros, atoms)
        super().__init__(in_features, out_features)
        self.block, self.atoms, self.nonzeros = block, atoms, nonzeros
        blocks = out_features // block
        self.bases = nn.Parameter(torch.zeros(blocks, block, atoms, device=device, dtype=dtype))
        self._add_coefficients(blocks * in_features, bias, device, dtype)

    @property
    def coefficients(self) -> Tensor:
        """S_bᵀ of all blocks, dense, (m/p, n, k)."""
        return super().coefficients.view(len(self.bases), self.in_features, self.atoms)

    @property
    def weight(self) -> Tensor:
        """W, (m, n)."""
        return (self.bases @ self.coefficients.mT).flatten(0, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        # One product with the coefficients of all blocks side by side; W itself is not built.
        blocks = len(self.bases)
        together = self.coefficients.transpose(0, 1).flatten(1)  # (n, m/p · k)
        hidden = (input @ together.to(input.dtype)).view(*input.shape[:-1], blocks, self.atoms)
        result = torch.einsum("...bk,bpk->...bp", hidden, self.bases.to(hidden.dtype)).flatten(-2)
        return result if self.bias is None else result + self.bias.to(result.dtype)

    @torch.no_grad()
    def set_block(self, index: int, basis: Tensor, places: Tensor, values: Tensor) -> None:
        """Set D_b, (p, k), and the places, (n, k) booleans, and values, (n, s), of S_bᵀ."""
        rows = slice(index * self.in_features, (index + 1) * self.in_features)
        self.bases[index] = basis
        self.support[rows] = pack_bits(places)
        self.values[rows] = values.to(self.values.dtype)
