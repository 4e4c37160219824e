"""Costs of a factorised layer at each rank: in parameters, bytes or arithmetic operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Cost = Callable[[str, int, int, int | None], float]
"""A function from a layer's name, m, n and a rank, or None for the dense layer, to the layer's cost."""
COSTS = ("bytes", "flops")
ATOMS_PER_VALUE = 2
"""How many atoms a dictionary has for each value in a row of its coefficients: k / s, as in CoSpaDi."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a linear layer and of the factorised layer that may replace it.

    Attributes:
        out_features, in_features: m and n.
        dtype: dtype of the layer's weight.
        has_bias: whether the layer has a bias; the factorised layer then has one too.
        gets_bias: whether the factorised layer has a bias even if the layer has none.
        is_dictionary: whether a rank is a number of atoms of a dictionary, with half as many values in each row.
        positions: how many positions the layer has seen in calibration; 1 if that is not known.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    has_bias: bool = False
    gets_bias: bool = False
    is_dictionary: bool = False
    positions: int = 1

    @property
    def max_rank(self) -> int:
        """The largest possible rank or number of atoms."""
        return self.out_features if self.is_dictionary else min(self.out_features, self.in_features)

    def bytes(self, rank: int | None) -> int:
        """Give the bytes of the layer's numbers, which are the same on disk and in memory. Rank None is dense."""
        m, n = self.out_features, self.in_features
        if rank is None:
            return self.dtype.itemsize * (m * n + m * self.has_bias)
        biases = m * (self.has_bias or self.gets_bias)
        if self.is_dictionary:
            # Each row of coefficients has one bit for each atom, packed into bytes.
            numbers = rank * n + nonzeros_of(rank) * m + biases
            return self.dtype.itemsize * numbers + m * math.ceil(rank / 8)
        return self.dtype.itemsize * (rank * (m + n) + biases)

    def parameters(self, rank: int | None) -> int:
        """Give the bytes divided by those of one number, so that the bits of a dictionary's places count too."""
        return math.ceil(self.bytes(rank) / self.dtype.itemsize)

    def flops(self, rank: int | None) -> int:
        """Give the number of multiplications and additions, for all positions."""
        m, n = self.out_features, self.in_features
        return 2 * self.positions * (m * n if rank is None else rank * (m + n))


def nonzeros_of(atoms: int) -> int:
    """Give the number of values in each row of coefficients, for a dictionary with this number of atoms."""
    return max(1, atoms // ATOMS_PER_VALUE)


def ranks_that_pay(cost: Callable[[int | None], float], most: int) -> Sequence[float]:
    """Give the costs of rank 1, 2, … and stop before the first rank that costs as much as the dense layer.

    A cost that is not above the one before it is raised by the least amount that a float allows: greedy allocation
    divides gains by differences of costs.
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
