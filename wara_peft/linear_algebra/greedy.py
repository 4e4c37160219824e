"""Spending a budget greedily: take the best of all next steps, for as long as steps fit."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """A step on a path, such as one more unit of rank for a layer."""

    priority: float
    """Steps of high priority are taken first. It is gain / cost if the total gain should be large."""
    cost: float


def spend(paths: Sequence[Iterable[Step]], budget: float) -> list[int]:
    """Number of steps that each path takes; together they cost no more than the budget.

    Each time the step of the highest priority among the next steps of all paths is taken; among equal ones that of the
    first path. A path ends before its first step that does not fit. A path's iterable is asked for a step only after
    the step before was taken.

    If priorities are gain / cost and fall along each path, the total gain is below the optimum by no more than the
    gain of the first step that was left out. If all costs are equal besides, it is the optimum.
    """
    steps = [iter(path) for path in paths]
    taken = [0] * len(paths)
    # The smallest entry comes first, so priorities are negated; the index decides between equal ones.
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
