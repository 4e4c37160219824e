"""Matrices with values in a few places, which are kept as bits, and the base class of layers that have them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import check_whole_number
from .base import Factorized


class SparseRows(Factorized):
    """A linear layer with sparse coefficients: a matrix of k columns with s values in each row.

    Attributes:
        atoms, nonzeros: k and s.
        values: (rows, s), the values of each row from left to right.
        support: (rows, ⌈k/8⌉) bytes; bit j % 8 of byte j // 8 says whether there is a value in column j.
    """

    atoms: int
    nonzeros: int
    support: Tensor
    sizes: ClassVar[tuple[str, ...]] = ("atoms", "nonzeros")

    def _add_coefficients(
        self, rows: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Add coefficients, whose values are zeros in the first s places of each row, and a bias of zeros."""
        self.values = nn.Parameter(torch.zeros(rows, self.nonzeros, device=device, dtype=dtype))
        places = torch.arange(self.atoms, device=device) < self.nonzeros
        self.register_buffer("support", pack_bits(places.expand(rows, self.atoms)))
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None

    @property
    def coefficients(self) -> Tensor:
        """The coefficients as a dense matrix, (rows, k)."""
        return scatter_values(unpack_bits(self.support, self.atoms), self.values)


def check_nonzeros(nonzeros: int, atoms: int) -> None:
    """Refuse more values in a row than it has places."""
    check_whole_number("atoms", atoms)
    check_whole_number("nonzeros", nonzeros, most=atoms)


def scatter_values(places: Tensor, values: Tensor) -> Tensor:
    """The matrix with these values, row by row from left to right, where `places` is True, and zeros elsewhere."""
    return values.new_zeros(places.shape).masked_scatter(places, values)


def pack_bits(places: Tensor) -> Tensor:
    """Pack booleans, (m, k), into bits, (m, ⌈k/8⌉) bytes. Column j is bit j % 8 of byte j // 8."""
    rows = functional.pad(places.to(torch.uint8), (0, -places.shape[1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=places.device)
    return (rows.view(len(rows), -1, 8) * weights).sum(2, dtype=torch.uint8)


def unpack_bits(support: Tensor, atoms: int) -> Tensor:
    """Inverse of `pack_bits`: the booleans, (m, k), with k = `atoms`."""
    bits = support[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=support.device)
    return (bits & 1).bool().flatten(1)[:, :atoms]
