"""Ranks of layers under one budget, from what each rank costs and what it loses; nothing here knows of models."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...linear_algebra.greedy import Step, spend
from ...messages import first_few

ALLOCATIONS = ("uniform", "greedy", "cost", "depth")
FLOOR = 0.75
"""Of the rank at an even share of cost, what greedy ranks leave a layer whose error is a share of its own output: a
few directions of large outputs hide what the others are worth to the model."""


_Point = tuple[int | None, float, float]
"""A rank, its cost and its loss."""


@dataclass(frozen=True)
class Candidate:
    """A layer that may get a rank, or stay as it is.

    Attributes:
        name: the layer's.
        costs: of rank 1, 2, …, as long as they are less than that of the dense layer, and growing; empty where no rank
            pays, and the layer stays dense.
        dense: cost of the layer as it is.
        gains: what each unit of rank takes off the loss, in descending order; at least as many as costs. The dense
            layer loses nothing.
    """

    name: str
    costs: Sequence[float]
    dense: float
    gains: Sequence[float] = ()

    def cost(self, rank: int | None) -> float:
        return self.dense if rank is None else self.costs[rank - 1]

    def ranks_from(self, rank: int | None) -> list[int | None]:
        """The rank and all after it; beyond the last rank that pays the layer is dense."""
        return [None] if rank is None else [*range(rank, len(self.costs) + 1), None]

    def gain(self, rank: int, further: int | None) -> float:
        """How much less is lost at the second rank than at the first."""
        return sum(self.gains[rank:further])

    def steps(self, ranks: Sequence[int | None]) -> Iterator[Step]:
        """The steps from each of these ranks to the next one, by their gain for their cost."""
        for rank, further in itertools.pairwise(ranks):
            cost = self.cost(further) - self.cost(rank)
            yield Step(self.gain(rank or 0, further) / cost, cost)


def least(candidates: Sequence[Candidate]) -> list[int | None]:
    """Rank 1 for each, None where no rank pays."""
    return [1 if candidate.costs else None for candidate in candidates]


def total_cost(candidates: Sequence[Candidate], ranks: Sequence[int | None]) -> float:
    return sum(candidate.cost(rank) for candidate, rank in zip(candidates, ranks, strict=True))


def check_budget(candidates: Sequence[Candidate], budget: float, unit: str) -> None:
    """Refuse a budget that no ranks meet.

    Raises:
        ValueError: it is less than all layers cost at rank 1.
    """
    lowest = total_cost(candidates, least(candidates))
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
    """Ranks that lose little together, and cost no more than the budget; None is dense.

    From the floors on, which are 1 if not given and must fit the budget, steps are taken in the order of what they
    gain for what they cost: single units of rank, or the step to the dense layer where its gain for its cost is more
    than that of further units (the lower convex hull of each layer's losses over costs). Steps that no longer fit are
    left out, with all that follow in their layer. What is left then goes to single units in the same order, so that it
    is less than any further unit would cost.

    The loss exceeds the optimum by no more than the gain of the first step that was left out.
    """
    ranks = least(candidates) if floors is None else list(floors)
    # Along a hull each step gains less for its cost than the one before.
    hulls = [_hull(candidate, rank) for candidate, rank in zip(candidates, ranks, strict=True)]
    ranks = _spent_on(candidates, hulls, budget)
    units = [candidate.ranks_from(rank) for candidate, rank in zip(candidates, ranks, strict=True)]
    return _spent_on(candidates, units, budget)


def _spent_on(
    candidates: Sequence[Candidate], paths: Sequence[Sequence[int | None]], budget: float
) -> list[int | None]:
    """The ranks, each on its candidate's path, at which the budget is spent greedily."""
    left = budget - total_cost(candidates, [path[0] for path in paths])
    steps = [candidate.steps(path) for candidate, path in zip(candidates, paths, strict=True)]
    return [path[taken] for path, taken in zip(paths, spend(steps, left), strict=True)]


def minimum_ranks(candidates: Sequence[Candidate], budget: float) -> list[int | None]:
    """The ranks that greedy ranks do not go below: a share of those that all layers have at the same share of cost."""
    even = ranks_by_shares(candidates, [1.0] * len(candidates), budget)
    return [
        max(1, int(FLOOR * (rank or len(candidate.costs)))) if candidate.costs else None
        for candidate, rank in zip(candidates, even, strict=True)
    ]


def ranks_by_shares(candidates: Sequence[Candidate], shares: Sequence[float], budget: float) -> list[int | None]:
    """Ranks whose costs are in proportion to the shares of their dense layers' costs, as large as the budget allows.

    Each layer gets the largest rank that costs no more than scale · share of what it costs as it is, at least 1, and
    stays dense from 1 on. What is left goes to single units, in the order of the shares.
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
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if total_cost(candidates, ranks_at(middle)) <= budget else (low, middle)
    ranks = ranks_at(low)
    order = sorted(range(len(candidates)), key=lambda index: -shares[index])
    units = [candidates[index].ranks_from(ranks[index]) for index in order]
    in_turn = [
        (Step(-number, step.cost) for number, step in enumerate(candidates[index].steps(path)))
        for index, path in zip(order, units, strict=True)
    ]
    left = budget - total_cost(candidates, ranks)
    for index, path, taken in zip(order, units, spend(in_turn, left), strict=True):
        ranks[index] = path[taken]
    return ranks


def _hull(candidate: Candidate, floor: int | None) -> list[int | None]:
    """The ranks, from a floor to dense, at the corners of the lower convex hull of losses over costs."""
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
    (_, x0, y0), (_, x1, y1), (_, x2, y2) = one, middle, last
    return (y1 - y0) * (x2 - x0) > (y2 - y0) * (x1 - x0)
