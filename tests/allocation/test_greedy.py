"""The greedy choice against all choices there are."""

from __future__ import annotations

import itertools
import random

import pytest

from wara_peft.allocation.greedy import Item, spend


def instance(seed: int, equal_costs: bool) -> tuple[list[Item], int]:
    numbers = random.Random(seed)
    items = [
        Item(
            sorted((numbers.random() for _ in range(numbers.randint(1, 4))), reverse=True),
            5 if equal_costs else numbers.randint(1, 9),
        )
        for _ in range(3)
    ]
    return items, numbers.randint(1, 45)


def gain(items: list[Item], ranks: tuple[int, ...] | list[int]) -> float:
    return sum(sum(item.gains[:rank]) for item, rank in zip(items, ranks, strict=True))


def cost(items: list[Item], ranks: tuple[int, ...] | list[int]) -> int:
    return sum(item.cost * rank for item, rank in zip(items, ranks, strict=True))


@pytest.mark.parametrize("equal_costs", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_against_brute_force(seed, equal_costs):
    items, budget = instance(seed, equal_costs)
    found = spend(items, budget)
    choices = itertools.product(*(range(len(item.gains) + 1) for item in items))
    best = max(gain(items, ranks) for ranks in choices if cost(items, ranks) <= budget)
    assert cost(items, found) <= budget
    left = [(item.gains[rank], item.cost) for item, rank in zip(items, found, strict=True) if rank < len(item.gains)]
    assert all(price > budget - cost(items, found) for _, price in left)
    # The first that was left out is the densest of those that are.
    first = max(left, key=lambda unit: unit[0] / unit[1])[0] if left else 0.0
    assert best - gain(items, found) <= (1e-12 if equal_costs else first + 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_order_and_scale_do_not_matter(seed):
    items, budget = instance(seed, equal_costs=False)
    found = spend(items, budget)
    for order in itertools.permutations(range(3)):
        assert spend([items[index] for index in order], budget) == [found[index] for index in order]
    scaled = [Item([1024 * value for value in item.gains], item.cost) for item in items]
    assert spend(scaled, budget) == found


def test_floors_ties_and_a_budget_below_the_floors():
    items = [Item([1.0, 1.0], 2), Item([0.0, 0.0], 3, floor=1), Item([1.0, 1.0], 2)]
    assert spend(items, 7) == [2, 1, 0]
    with pytest.raises(ValueError, match="cost 3, more than the budget of 2"):
        spend(items, 2)
