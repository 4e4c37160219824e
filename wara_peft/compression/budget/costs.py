"""What a factorised layer costs at each rank: parameters, bytes, arithmetic, or time on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Cost = Callable[[str, int, int, int | None], float]
"""Takes a layer's name, m, n and a rank, or None for the dense layer, and gives its cost."""
COSTS = ("bytes", "flops", "latency")
POSITIONS = 128
"""How many positions a layer is timed with."""
ATOMS_PER_VALUE = 2
"""k / s of dictionaries, as in CoSpaDi."""


@dataclass(frozen=True)
class Shape:
    """A layer and what it becomes.

    Attributes:
        out_features, in_features: m and n.
        dtype, device: of its weight.
        has_bias: whether it has a bias, and the factorised layer so too.
        gets_bias: whether the factorised layer has one in any case.
        is_dictionary: whether ranks are numbers of atoms of a dictionary, with half as many values in each row.
        positions: how many positions it has seen in calibration, 1 where that is not known.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device
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


@dataclass
class Latency:
    """Seconds of a layer at each rank, between a few that are timed here, where the model is."""

    _tables: dict[tuple[int, int, torch.dtype, torch.device], tuple[list[int], list[float], float]] = field(
        default_factory=dict
    )

    def __call__(self, shape: Shape, rank: int | None) -> float:
        key = shape.out_features, shape.in_features, shape.dtype, shape.device
        if key not in self._tables:
            self._tables[key] = _timed(*key)
        ranks, seconds, dense = self._tables[key]
        return dense if rank is None else float(np.interp(rank, ranks, seconds))


def _timed(m: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[list[int], list[float], float]:
    """Some ranks, their seconds, which never fall, and those of the dense layer."""
    most = min(m, n)
    ranks = sorted({max(1, round(most * share)) for share in (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)})
    x = torch.zeros(POSITIONS, n, dtype=dtype, device=device)
    weight = torch.zeros(m, n, dtype=dtype, device=device)

    def run_dense() -> Tensor:
        return functional.linear(x, weight)

    def factorised(rank: int) -> Callable[[], Tensor]:
        down, up = weight[:rank].contiguous(), weight.new_zeros(m, rank)

        def run() -> Tensor:
            return functional.linear(functional.linear(x, down), up)

        return run

    seconds = [_seconds(factorised(rank)) for rank in ranks]
    return ranks, np.maximum.accumulate(seconds).tolist(), _seconds(run_dense)


def _seconds(run: Callable[[], Tensor]) -> float:
    """The least time of a few runs."""
    found = []
    for _ in range(8):
        start = time.perf_counter()
        device = run().device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


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
