"""Spends a budget greedily: the best of all next steps is taken, for as long as steps fit."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """A step on a path, such as one more unit of rank for a layer."""

    priority: float
    """Its gain for its cost, where the total gain is to be large."""
    cost: float


def spend(paths: Sequence[Iterable[Step]], budget: float) -> list[int]:
    """Number of steps that each path takes; together they cost no more than the budget.

    Of the next steps of all paths the one of the highest priority is taken, and the first path's of equal ones. A path
    ends before its first step that does not fit. A path's steps are only made when it comes to them.

    Where priorities are gain / cost and fall along each path, the total gain is less than the optimum by no more than
    the gain of the first step that was left out, and is the optimum where all costs are equal.
    """
    steps = [iter(path) for path in paths]
    taken = [0] * len(paths)
    heap: list[tuple[float, int, float]] = []

    def push_next_step(index: int) -> None:
        for step in itertools.islice(steps[index], 1):
            heapq.heappush(heap, (-step.priority, index, step.cost))

    for index in range(len(paths)):
        push_next_step(index)
    while heap:
        _, index, cost = heapq.heappop(heap)
        if cost <= budget:
            budget -= cost
            taken[index] += 1
            push_next_step(index)
    return taken
