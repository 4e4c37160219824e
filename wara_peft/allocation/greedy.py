"""Spends a budget on units of rank in the order of gain per cost; no model or tensor is needed for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..linear_algebra import greedy
from ..linear_algebra.greedy import Step


@dataclass(frozen=True)
class Item:
    """A subband of a module, for example: it takes units of rank one after the other.

    Attributes:
        gains: the gain of each further unit, in descending order; the item takes at most as many units as gains.
        cost: the cost of one unit.
        floor: how many units the item gets in any case.
    """

    gains: Sequence[float]
    cost: int
    floor: int = 0


def spend(items: Sequence[Item], budget: int) -> list[int]:
    """Choose how many units each item gets, so that they gain much and together cost no more than the budget.

    Every item first gets its floor. Then units are taken in the order of gain / cost, largest first; a unit that no
    longer fits is left out. If two ratios are equal, the earlier item goes first. The total gain is less than the
    optimum by no more than the gain of the first unit that was left out; if all costs are equal, it is the optimum.
    The rest of the budget is less than the cost of any unit that is left.

    Raises:
        ValueError: the floors cost more than the budget.
    """
    left = budget - sum(item.floor * item.cost for item in items)
    if left < 0:
        raise ValueError(f"The least ranks alone cost {budget - left:,}, more than the budget of {budget:,}.")
    paths = [[Step(gain / item.cost, item.cost) for gain in item.gains[item.floor :]] for item in items]
    return [item.floor + taken for item, taken in zip(items, greedy.spend(paths, left), strict=True)]


def units_that_fit(scores: Sequence[float], costs: Sequence[int], budget: int) -> list[bool]:
    """Choose which single units to keep: those with the highest scores that together fit into the budget.

    Units are taken in the order of scores, largest first. A unit that no longer fits is passed over, and smaller ones
    after it may still be taken. If two scores are equal, the earlier unit goes first.
    """
    taken = greedy.spend([[Step(score, cost)] for score, cost in zip(scores, costs, strict=True)], budget)
    return [count > 0 for count in taken]
