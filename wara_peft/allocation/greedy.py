"""Spending a budget on units of rank by gain per cost; nothing here knows of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..linear_algebra import greedy
from ..linear_algebra.greedy import Step


@dataclass(frozen=True)
class Item:
    """Something that takes units of rank one after the other.

    Attributes:
        gains: what each further unit gains, in descending order; there are no more units than gains.
        cost: what each of them costs.
        floor: how many it gets in any case.
    """

    gains: Sequence[float]
    cost: int
    floor: int = 0


def spend(items: Sequence[Item], budget: int) -> list[int]:
    """Number of units of each item that gain much for what they cost, and cost no more than the budget together.

    The floors come first; then units in the order of gain / cost, largest first, of which those are left out that no
    longer fit. Equal ones go by the order of the items. The total gain is less than the optimum by no more than the
    gain of the first unit that was left out, and is the optimum where all costs are equal. What remains of the budget
    is less than the cost of any unit that is left.

    Raises:
        ValueError: the floors alone cost more.
    """
    left = budget - sum(item.floor * item.cost for item in items)
    if left < 0:
        raise ValueError(f"The least ranks alone cost {budget - left:,}, more than the budget of {budget:,}.")
    paths = [[Step(gain / item.cost, item.cost) for gain in item.gains[item.floor :]] for item in items]
    return [item.floor + taken for item, taken in zip(items, greedy.spend(paths, left), strict=True)]


def units_that_fit(scores: Sequence[float], costs: Sequence[int], budget: int) -> list[bool]:
    """Which of single units to keep: those of the highest scores that fit into the budget together.

    In the order of scores, largest first and equal ones as they stand, each is taken that still fits.
    """
    taken = greedy.spend([[Step(score, cost)] for score, cost in zip(scores, costs, strict=True)], budget)
    return [count > 0 for count in taken]
