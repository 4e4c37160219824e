"""Ranks under a budget, beside all combinations there are."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from wara_peft.compression.budget.costs import Shape, ranks_that_pay
from wara_peft.compression.budget.depth import depth_shares
from wara_peft.compression.budget.spend import (
    Candidate,
    check_budget,
    greedy_ranks,
    minimum_ranks,
    ranks_by_shares,
    total_cost,
)


def some(count: int, seed: int) -> list[Candidate]:
    """Layers of four ranks with costs in proportion, and of two units more that only the dense layer has."""
    numbers = random.Random(seed)
    found = []
    for index in range(count):
        unit = numbers.randint(3, 9)
        gains = sorted((numbers.random() ** 3 for _ in range(6)), reverse=True)
        found.append(
            Candidate(
                f"layer{index}", [unit * rank for rank in range(1, 5)], unit * 4 + numbers.randint(1, unit), gains
            )
        )
    return found


def lost(candidates: list[Candidate], ranks: tuple[int | None, ...] | list[int | None]) -> float:
    return sum(
        0 if rank is None else sum(candidate.gains[rank:]) for candidate, rank in zip(candidates, ranks, strict=True)
    )


class TestGreedy:
    @pytest.mark.parametrize("seed", range(40))
    def test_beside_all_combinations(self, seed: int) -> None:
        candidates = some(3, seed)
        least, most = (total_cost(candidates, [rank] * 3) for rank in (1, None))
        budget = least + (most - least) * (seed % 10 + 0.5) / 10
        ranks = greedy_ranks(candidates, budget)
        assert total_cost(candidates, ranks) <= budget
        possible = [
            choice
            for choice in itertools.product([1, 2, 3, 4, None], repeat=3)
            if total_cost(candidates, choice) <= budget
        ]
        best = min(lost(candidates, choice) for choice in possible)
        # No more than the largest single step: from any rank to any other.
        step = max(sum(candidate.gains[1:]) for candidate in candidates)
        assert best - 1e-12 <= lost(candidates, ranks) <= best + step
        for index, (candidate, rank) in enumerate(zip(candidates, ranks, strict=True)):
            if rank is not None:  # and nothing more fits
                further = [*ranks]
                further[index] = candidate.ranks_from(rank)[1]
                assert total_cost(candidates, further) > budget

    def test_is_the_optimum_where_units_cost_alike(self) -> None:
        gains = [[5.0, 3, 2, 0.5, 0.1], [4, 1, 0.9, 0.2, 0.1]]
        candidates = [Candidate(str(index), [2, 4, 6, 8], 50, entry) for index, entry in enumerate(gains)]
        for budget in range(4, 17, 2):
            ranks = greedy_ranks(candidates, budget)
            choices = itertools.product(range(1, 5), repeat=2)
            best = min(lost(candidates, choice) for choice in choices if 2 * sum(choice) <= budget)
            assert lost(candidates, ranks) == pytest.approx(best) and total_cost(candidates, ranks) == budget

    def test_a_layer_of_even_directions_stays_dense_before_it_gets_half_its_rank(self) -> None:
        even = Candidate("even", [2 * rank for rank in range(1, 5)], 9, [1.0] * 9)
        steep = Candidate("steep", [2 * rank for rank in range(1, 5)], 9, [9.0, 0.1] + [0.0] * 7)
        assert greedy_ranks([even, steep], 11) == [None, 1]

    def test_order_of_layers_does_not_matter(self) -> None:
        candidates = some(6, 7)
        ranks = dict(zip(range(6), greedy_ranks(candidates, 100), strict=True))
        order = [3, 1, 5, 0, 2, 4]
        assert greedy_ranks([candidates[index] for index in order], 100) == [ranks[index] for index in order]

    def test_floors_come_first(self) -> None:
        steep = Candidate("steep", [2 * rank for rank in range(1, 9)], 17, [9.0, *[0.01] * 8])
        even = Candidate("even", [2 * rank for rank in range(1, 9)], 17, [1.0] * 9)
        narrow = Candidate("narrow", [], 3, [1.0])
        assert greedy_ranks([steep, even, narrow], 23) == [1, None, None]
        floors = minimum_ranks([steep, even, narrow], 23)
        # Uniform ranks are 5 and 5, of which three quarters stay; what remains goes where it gains most.
        assert floors == [3, 3, None]
        assert greedy_ranks([steep, even, narrow], 23, floors) == [3, 7, None]

    def test_scaled_gains_change_nothing(self) -> None:
        candidates = some(5, 3)
        scaled = [Candidate(c.name, c.costs, c.dense, [7 * gain for gain in c.gains]) for c in candidates]
        assert greedy_ranks(candidates, 90) == greedy_ranks(scaled, 90)


class TestShares:
    @pytest.mark.parametrize("budget", [40, 60, 77, 100, 120])
    def test_even_shares_give_even_costs(self, budget: int) -> None:
        candidates = [Candidate(str(size), range(size, 10 * size, size), 10 * size) for size in (1, 2, 4, 8)]
        ranks = ranks_by_shares(candidates, [1.0] * 4, budget)
        left = budget - total_cost(candidates, ranks)
        assert 0 <= left < min(size for size, rank in zip((1, 2, 4, 8), ranks, strict=True) if rank is not None)
        assert max(ranks) - min(ranks) <= 2

    def test_larger_shares_come_first(self) -> None:
        candidates = [Candidate(str(index), range(1, 100), 101) for index in range(3)]
        ranks = ranks_by_shares(candidates, [1.0, 0.75, 0.5], 91)
        assert sum(ranks) == 91 and ranks[0] == pytest.approx(91 / 2.25, abs=2)
        assert ranks[1] == pytest.approx(ranks[0] * 0.75, abs=2)

    def test_where_all_fits_all_is_dense(self) -> None:
        assert ranks_by_shares(some(3, 1), [1.0, 0.5, 0.7], 1e9) == [None] * 3


class TestDepth:
    def test_the_formula(self) -> None:
        condition = {0: (8.0, 2.0), 1: (5.0, 1.0), 2: (3.0, 4.0)}
        layers = {}
        for block, values in condition.items():
            for part, kappa in zip("kv", values, strict=True):
                layer = torch.nn.Linear(2, 2)
                layer.weight.data = torch.diag(torch.tensor([kappa, 1.0]))
                layers[f"model.layers.{block}.{part}_proj"] = layer
        logs = torch.tensor([8 * 2 * 5 * 3 * 4, 5 * 3 * 4, 3 * 4]).log()
        expected = 1 - (logs.max() - logs) / (logs.max() - logs.min()) * 0.5
        torch.testing.assert_close(torch.tensor(depth_shares(layers)), expected.repeat_interleave(2))

    def test_layers_outside_of_blocks(self) -> None:
        with pytest.raises(ValueError, match="'key' is in none"):
            depth_shares({"key": torch.nn.Linear(2, 2)})


class TestCosts:
    @pytest.mark.parametrize("has_bias", [True, False])
    @pytest.mark.parametrize("gets_bias", [True, False])
    def test_ranks_up_to_the_break_even(self, has_bias: bool, gets_bias: bool) -> None:
        shape = Shape(12, 20, torch.bfloat16, has_bias, gets_bias)
        costs = ranks_that_pay(shape.parameters, shape.max_rank)
        bias = 12 * (has_bias or gets_bias)
        assert list(costs) == [rank * 32 + bias for rank in range(1, len(costs) + 1)]
        assert costs[-1] < 240 + 12 * has_bias <= (len(costs) + 1) * 32 + bias
        assert shape.bytes(3) == 2 * shape.parameters(3)

    def test_a_dictionary_pays_for_its_bits(self) -> None:
        shape = Shape(400, 300, torch.bfloat16, True, is_dictionary=True)
        assert shape.bytes(120) == 2 * (120 * 300 + 400 * 60 + 400) + 400 * 120 // 8
        assert shape.parameters(120) == shape.bytes(120) // 2

    def test_no_rank_pays_in_a_narrow_layer(self) -> None:
        shape = Shape(2, 20, torch.float32, True)
        assert list(ranks_that_pay(shape.parameters, shape.max_rank)) == [24]  # of 42
        assert ranks_that_pay(Shape(1, 20, torch.float32).parameters, 1) == []

    def test_costs_that_do_not_grow_still_have_a_price(self) -> None:
        costs = ranks_that_pay(lambda rank: 9.0 if rank is None else 1.0, 5)
        assert len(costs) == 5 and all(a < b for a, b in itertools.pairwise(costs)) and costs[-1] < 1.001


def test_a_budget_that_nothing_meets() -> None:
    candidates = [*some(2, 0), Candidate("narrow", [], 30, [1.0])]
    with pytest.raises(ValueError, match=r"budget of 20 parameters is less than \d+, .*no rank pays in 'narrow'"):
        check_budget(candidates, 20, "parameters")
