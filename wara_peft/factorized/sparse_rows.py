"""Matrices with values in a few places, which are kept as bits, and what layers with such coefficients share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import check_whole_number
from .base import Factorized


class SparseRows(Factorized):
    """A linear layer with coefficients that have s values in each row of k columns.

    Attributes:
        atoms, nonzeros: k and s.
        values: (rows, s), row by row from left to right.
        support: (rows, ⌈k/8⌉) bytes; bit j % 8 of byte j // 8 says whether there is a value in column j.
    """

    atoms: int
    nonzeros: int
    support: Tensor
    sizes: ClassVar[tuple[str, ...]] = ("atoms", "nonzeros")

    def _add_coefficients(
        self, rows: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Add coefficients, with zeros in the first places of each row, and a bias of zeros."""
        self.values = nn.Parameter(torch.zeros(rows, self.nonzeros, device=device, dtype=dtype))
        places = torch.arange(self.atoms, device=device) < self.nonzeros
        self.register_buffer("support", pack_bits(places.expand(rows, self.atoms)))
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None

    @property
    def coefficients(self) -> Tensor:
        """All rows, dense."""
        return scatter_values(unpack_bits(self.support, self.atoms), self.values)


def check_nonzeros(nonzeros: int, atoms: int) -> None:
    """Refuse a number of values that a row has no places for."""
    check_whole_number("atoms", atoms)
    check_whole_number("nonzeros", nonzeros, most=atoms)


def scatter_values(places: Tensor, values: Tensor) -> Tensor:
    """The matrix that has the values, row by row from left to right, in these places, and zeros elsewhere."""
    return values.new_zeros(places.shape).masked_scatter(places, values)


def pack_bits(places: Tensor) -> Tensor:
    """Booleans (m, k) as bits, (m, ⌈k/8⌉) bytes."""
    rows = functional.pad(places.to(torch.uint8), (0, -places.shape[1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=places.device)
    return (rows.view(len(rows), -1, 8) * weights).sum(2, dtype=torch.uint8)


def unpack_bits(support: Tensor, atoms: int) -> Tensor:
    """The booleans, (m, k), again."""
    bits = support[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=support.device)
    return (bits & 1).bool().flatten(1)[:, :atoms]
