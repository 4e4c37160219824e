"""What a factorised layer costs at each rank: parameters, bytes or arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Cost = Callable[[str, int, int, int | None], float]
"""Takes a layer's name, m, n and a rank, or None for the dense layer, and gives its cost."""
COSTS = ("bytes", "flops")
ATOMS_PER_VALUE = 2
"""k / s of dictionaries, as in CoSpaDi."""


@dataclass(frozen=True)
class Shape:
    """A layer and what it becomes.

    Attributes:
        out_features, in_features: m and n.
        dtype: of its weight.
        has_bias: whether it has a bias, and the factorised layer so too.
        gets_bias: whether the factorised layer has one in any case.
        is_dictionary: whether ranks are numbers of atoms of a dictionary, with half as many values in each row.
        positions: how many positions it has seen in calibration, 1 where that is not known.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    has_bias: bool = False
    gets_bias: bool = False
    is_dictionary: bool = False
    positions: int = 1

    @property
    def most(self) -> int:
        """The largest rank that there is, or number of atoms."""
        return self.out_features if self.is_dictionary else min(self.out_features, self.in_features)

    def bytes(self, rank: int | None) -> int:
        """On disk and in memory."""
        m, n = self.out_features, self.in_features
        if rank is None:
            return self.dtype.itemsize * (m * n + m * self.has_bias)
        biases = m * (self.has_bias or self.gets_bias)
        if self.is_dictionary:
            numbers = rank * n + nonzeros_of(rank) * m + biases
            return self.dtype.itemsize * numbers + m * math.ceil(rank / 8)
        return self.dtype.itemsize * (rank * (m + n) + biases)

    def parameters(self, rank: int | None) -> int:
        """Bytes in units of one number: the places of a dictionary's values count too."""
        return math.ceil(self.bytes(rank) / self.dtype.itemsize)

    def flops(self, rank: int | None) -> int:
        """Multiplications and additions, for all positions."""
        m, n = self.out_features, self.in_features
        return 2 * self.positions * (m * n if rank is None else rank * (m + n))


def nonzeros_of(atoms: int) -> int:
    """Values in each row of the coefficients of a dictionary with so many atoms."""
    return max(1, atoms // ATOMS_PER_VALUE)


def ranks_that_pay(cost: Callable[[int | None], float], most: int) -> Sequence[float]:
    """The costs of rank 1, 2, … up to the last one before the first that costs as much as the dense layer.

    Costs that do not grow are raised by next to nothing, for a unit must have a price.
    """
    dense = cost(None)
    found: list[float] = []
    for rank in range(1, most + 1):
        price = cost(rank)
        if found and price <= found[-1]:
            price = math.nextafter(found[-1], math.inf)
        if price >= dense:
            break
        found.append(price)
    return found
