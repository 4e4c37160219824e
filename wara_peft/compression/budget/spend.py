"""Choosing ranks of layers under one budget, from costs and gains of each rank. This file knows nothing of models."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...linear_algebra.greedy import Step, spend
from ...messages import first_few

ALLOCATIONS = ("uniform", "greedy", "cost", "depth")
FLOOR = 0.75
"""The least rank that greedy allocation may leave a layer, as a share of its uniform rank.

It applies to solvers that measure a layer's error as a share of its own output. In such an error a few directions with
large outputs hide what the other directions are worth to the model.
"""


_Point = tuple[int | None, float, float]
"""A rank, its cost and its loss."""


@dataclass(frozen=True)
class Candidate:
    """A layer that may get a rank or stay dense.

    Attributes:
        name: full name of the layer.
        costs: costs of rank 1, 2, …, which grow and stay below `dense`. It is empty if no rank costs less than the
            dense layer, which then stays.
        dense: cost of the dense layer.
        gains: what each unit of rank takes off the loss, in descending order; at least as many numbers as `costs`. The
            dense layer loses nothing.
    """

    name: str
    costs: Sequence[float]
    dense: float
    gains: Sequence[float] = ()

    def cost(self, rank: int | None) -> float:
        return self.dense if rank is None else self.costs[rank - 1]

    def ranks_from(self, rank: int | None) -> list[int | None]:
        """Give this rank and all higher ones; after the last rank of `costs` comes None, the dense layer."""
        return [None] if rank is None else [*range(rank, len(self.costs) + 1), None]

    def gain(self, rank: int, further: int | None) -> float:
        """Give how much less is lost at rank `further` than at `rank`."""
        # `further` is None for the dense layer: the slice then takes all gains that are left.
        return sum(self.gains[rank:further])

    def steps(self, ranks: Sequence[int | None]) -> Iterator[Step]:
        """Give the steps from each of these ranks to the next one, with gain / cost as their priority."""
        for rank, further in itertools.pairwise(ranks):
            cost = self.cost(further) - self.cost(rank)
            yield Step(self.gain(rank or 0, further) / cost, cost)


def lowest_ranks(candidates: Sequence[Candidate]) -> list[int | None]:
    """Give the lowest ranks: 1 for each candidate, or None where no rank costs less than the dense layer."""
    return [1 if candidate.costs else None for candidate in candidates]


def total_cost(candidates: Sequence[Candidate], ranks: Sequence[int | None]) -> float:
    return sum(candidate.cost(rank) for candidate, rank in zip(candidates, ranks, strict=True))


def check_budget(candidates: Sequence[Candidate], budget: float, unit: str) -> None:
    """Refuse a budget that is too small for every choice of ranks.

    Raises:
        ValueError: the budget is less than all layers together cost at their lowest ranks.
    """
    lowest = total_cost(candidates, lowest_ranks(candidates))
    if budget < lowest:
        dense = [repr(candidate.name) for candidate in candidates if not candidate.costs]
        why = f", as no rank pays in {first_few(dense)}" if dense else ""
        raise ValueError(
            f"The budget of {budget:,.12g} {unit} is less than {lowest:,.12g}, the least that the layers take{why}. "
            "Give more, or leave layers out of target_modules."
        )


def greedy_ranks(
    candidates: Sequence[Candidate], budget: float, floors: Sequence[int | None] | None = None
) -> list[int | None]:
    """Give ranks that together lose little and cost no more than the budget; None is dense.

    Each layer starts at its floor, which is rank 1 if `floors` is None. The floors must fit the budget. Then steps are
    taken in descending order of gain / cost. A step leads from one corner to the next on the lower convex hull of the
    layer's losses over costs: it is a unit of rank, or the step to the dense layer if that gains more for its cost
    than further units. A layer's path ends at its first step that does not fit. Budget that is left then goes to
    single units of rank in the same order, until no further unit fits.

    The loss exceeds the optimum by no more than the gain of the first step that was left out.
    """
    ranks = lowest_ranks(candidates) if floors is None else list(floors)
    # Along a hull each step gains less for its cost than the one before, as `spend` needs for its bound.
    hulls = [_hull(candidate, rank) for candidate, rank in zip(candidates, ranks, strict=True)]
    ranks = _spent_on(candidates, hulls, budget)
    units = [candidate.ranks_from(rank) for candidate, rank in zip(candidates, ranks, strict=True)]
    return _spent_on(candidates, units, budget)


def _spent_on(
    candidates: Sequence[Candidate], paths: Sequence[Sequence[int | None]], budget: float
) -> list[int | None]:
    """Spend the budget greedily; give for each candidate the rank on its path at which it then is."""
    left = budget - total_cost(candidates, [path[0] for path in paths])
    steps = [candidate.steps(path) for candidate, path in zip(candidates, paths, strict=True)]
    return [path[taken] for path, taken in zip(paths, spend(steps, left), strict=True)]


def minimum_ranks(candidates: Sequence[Candidate], budget: float) -> list[int | None]:
    """Give the floors for `greedy_ranks`: each layer's uniform rank times FLOOR, and at least 1."""
    even = ranks_by_shares(candidates, [1.0] * len(candidates), budget)
    return [
        max(1, int(FLOOR * (rank or len(candidate.costs)))) if candidate.costs else None
        for candidate, rank in zip(candidates, even, strict=True)
    ]


def ranks_by_shares(candidates: Sequence[Candidate], shares: Sequence[float], budget: float) -> list[int | None]:
    """Give ranks for which cost / dense cost is in proportion to the layers' shares, as large as the budget allows.

    For one scale, each layer gets the largest rank whose cost is at most scale · share · dense cost, but at least rank
    1. It stays dense if scale · share is 1 or more. The largest scale that fits the budget is found by bisection.
    Budget that is left goes to single units of rank, in descending order of the shares.
    """

    def ranks_at(scale: float) -> list[int | None]:
        found: list[int | None] = []
        for candidate, share in zip(candidates, shares, strict=True):
            whole = scale * share >= 1 or not candidate.costs
            found.append(None if whole else max(1, bisect_right(candidate.costs, scale * share * candidate.dense)))
        return found

    low, high = 0.0, 1 / min(shares)
    if total_cost(candidates, ranks_at(high)) <= budget:
        return ranks_at(high)
    for _ in range(100):  # more halvings than a float has bits
        middle = (low + high) / 2
        low, high = (middle, high) if total_cost(candidates, ranks_at(middle)) <= budget else (low, middle)
    ranks = ranks_at(low)
    order = sorted(range(len(candidates)), key=lambda index: -shares[index])
    units = [candidates[index].ranks_from(ranks[index]) for index in order]
    in_turn = [
        # `spend` takes high priorities first: here the k-th unit of every layer comes before any k+1-th.
        (Step(-number, step.cost) for number, step in enumerate(candidates[index].steps(path)))
        for index, path in zip(order, units, strict=True)
    ]
    left = budget - total_cost(candidates, ranks)
    for index, path, taken in zip(order, units, spend(in_turn, left), strict=True):
        ranks[index] = path[taken]
    return ranks


def _hull(candidate: Candidate, floor: int | None) -> list[int | None]:
    """Give the ranks, from a floor to dense, at the corners of the lower convex hull of losses over costs."""
    lost = sum(candidate.gains[floor:])
    points = []
    for rank in candidate.ranks_from(floor):
        points.append((rank, candidate.cost(rank), 0.0 if rank is None else lost))
        lost -= 0 if rank is None or rank >= len(candidate.gains) else candidate.gains[rank]
    hull: list[_Point] = []
    for point in points:
        # The last corner goes if it lies above the line from the one before it to this point.
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [rank for rank, _, _ in hull]


def _above(one: _Point, middle: _Point, last: _Point) -> bool:
    # Slopes are compared by products: no division, so equal costs do no harm.
    (_, x0, y0), (_, x1, y1), (_, x2, y2) = one, middle, last
    return (y1 - y0) * (x2 - x0) > (y2 - y0) * (x1 - x0)
