"""Running the quality suite: cells that are kept, what a stage wants, and a quick run of everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from tests.forked_python import run_python

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from quality import plan, quick  # noqa: E402
from quality.cells import Cell, Store  # noqa: E402
from quality.methods import LORA, RULES  # noqa: E402

CELL = Cell("digits/clean, 8 a class", LORA, 4.0, 0.01, 0)


SCRIPT = BENCHMARKS / "quality" / "run.py"


def run_quick(folder: Path, *options: str) -> str:
    """Run the whole plan of a quick run; what it prints."""
    done = run_python(SCRIPT, "--quick", "--results", folder, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def cells_in(folder: Path) -> list[Cell]:
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [Cell(*(line[name] for name in ("task", "method", "budget", "rate", "seed"))) for line in lines]


class TestStore:
    def test_results_come_back_and_survive_a_torn_line(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "results", tmp_path / "locks")
        store.append(CELL, {"validation": 0.5})
        file = tmp_path / "results" / "digits.jsonl"
        with file.open("a") as torn:
            torn.write('{"task": "digits/cl')
        assert store.results() == {CELL: {**CELL.__dict__, "validation": 0.5}}
        other = Cell("digits/clean, 8 a class", LORA, 4.0, 0.03, 0)
        Store(tmp_path / "results", tmp_path / "locks").append(other, {"validation": 0.6})
        assert {cell: found["validation"] for cell, found in store.results().items()} == {CELL: 0.5, other: 0.6}

    def test_a_cell_is_held_by_one_and_run_once(self, tmp_path: Path) -> None:
        first, second = (Store(tmp_path / "results", tmp_path / "locks") for _ in range(2))
        with first.claim(CELL) as mine, second.claim(CELL) as also_mine:
            assert mine and not also_mine
        with second.claim(CELL) as mine:
            assert mine
        first.append(CELL, {"validation": 0.5})
        with second.claim(CELL) as mine:
            assert not mine


class TestPlan:
    entry = plan.Entry("digits/clean, 8 a class", LORA, 4.0)

    def results(self, by_rate: dict[float, float | None]) -> dict[Cell, dict]:
        return {
            self.entry.cell(rate, seed): {"validation": value, "parameters": 1}
            for rate, value in by_rate.items()
            for seed in plan.TUNING_SEEDS
        }

    def test_the_grid_is_widened_at_the_edge_where_the_best_lies(self) -> None:
        assert {cell.rate for cell in plan.tuning(self.entry, {}, True).missing} == {0.003, 0.01, 0.03}
        found = plan.tuning(self.entry, self.results({0.003: 0.3, 0.01: 0.4, 0.03: 0.5}), True)
        assert found.chosen is None and [cell.rate for cell in found.missing] == [0.1, 0.1]
        found = plan.tuning(self.entry, self.results({0.003: 0.3, 0.01: 0.4, 0.03: 0.5, 0.1: 0.45}), True)
        assert found.chosen == 0.03 and not found.missing
        # Where all rates are too large for a method, the grid grows downwards.
        found = plan.tuning(self.entry, self.results(dict.fromkeys((0.003, 0.01, 0.03), 0.05)), True)
        assert {cell.rate for cell in found.missing} == {0.001}
        # A perplexity is the better the lower, and a run that did not end the worst.
        found = plan.tuning(self.entry, self.results({0.003: 9.0, 0.01: 8.0, 0.03: None}), False)
        assert found.chosen == 0.01
        # Equal everywhere since nothing trains: the middle, and no more runs.
        equal = self.results({0.003: 1.0, 0.01: 1.0, 0.03: 1.0})
        untrained = {cell: {**result, "parameters": 0} for cell, result in equal.items()}
        assert plan.tuning(self.entry, untrained, True).chosen == 0.01

    def test_equal_rates_the_smaller_is_taken_and_the_grid_grows_if_that_is_its_edge(self) -> None:
        found = plan.tuning(self.entry, self.results({0.003: 0.5, 0.01: 0.5, 0.03: 0.4}), True)
        assert found.chosen is None and {cell.rate for cell in found.missing} == {0.001}
        tied = self.results({0.001: 0.4, 0.003: 0.5, 0.01: 0.5, 0.03: 0.4})
        assert plan.tuning(self.entry, tied, True).chosen == 0.003
        # Errors, of which the smaller is better, likewise.
        tied = {cell: {**result, "validation": 1 - result["validation"]} for cell, result in tied.items()}
        assert plan.tuning(self.entry, tied, False).chosen == 0.003

    def disputed(self, *at_further_seeds: dict[float, float]) -> dict[Cell, dict]:
        """0.01 is better than 0.003 by seed 100, worse by seed 101, and better by the mean."""
        by_seed = {100: {0.003: 0.3, 0.01: 0.6, 0.03: 0.1}, 101: {0.003: 0.5, 0.01: 0.4, 0.03: 0.1}}
        by_seed |= dict(zip(plan.FURTHER_SEEDS, at_further_seeds, strict=False))
        results = {
            self.entry.cell(rate, seed): {"validation": value, "parameters": 1}
            for seed, values in by_seed.items()
            for rate, value in values.items()
        }
        return results | {self.entry.cell(0.001, seed): {"validation": 0.0, "parameters": 1} for seed in (100, 101)}

    def test_where_the_best_two_rates_are_within_noise_further_seeds_decide(self) -> None:
        found = plan.tuning(self.entry, self.disputed(), True)
        assert found.chosen == 0.01 and not found.missing  # it stands until they are run
        wanted = {self.entry.cell(rate, seed) for rate in (0.003, 0.01) for seed in plan.FURTHER_SEEDS}
        assert set(found.further) == wanted
        one = self.disputed({0.003: 0.9, 0.01: 0.4})
        assert set(plan.tuning(self.entry, one, True).further) == {cell for cell in wanted if cell.seed == 103}
        # Over all four seeds the means are 0.55 and 0.475, then 0.425 and 0.475, then equal.
        for last, chosen in ((0.5, 0.003), (0.0, 0.01), (0.2, 0.003)):
            found = plan.tuning(self.entry, self.disputed({0.003: 0.9, 0.01: 0.4}, {0.003: last, 0.01: 0.5}), True)
            assert (found.chosen, found.further) == (chosen, [])
            assert found.first_choice(True) == 0.01  # which stage one selects by
            edge = {0.001: 0.0} if chosen == 0.003 else {}  # the grid grows where the further seeds lead to its edge
            assert found.means == pytest.approx({0.003: 0.4, 0.01: 0.5, 0.03: 0.1, **edge})  # of the tuning seeds

    @pytest.mark.parametrize("higher", [True, False])
    def test_noise_is_two_standard_errors_of_the_paired_difference(self, higher: bool) -> None:
        draws = np.random.default_rng(0).normal(0.5, 0.1, (200, 2, 2))
        disputes = 0
        for best, second in draws:
            ends = 0.0 if higher else 9.0
            values = {0.003: best.tolist(), 0.01: second.tolist(), 0.001: [ends] * 2, 0.03: [ends] * 2}
            results = {
                self.entry.cell(rate, seed): {"validation": value, "parameters": 1}
                for rate, of_rate in values.items()
                for seed, value in zip(plan.TUNING_SEEDS, of_rate, strict=True)
            }
            found = plan.tuning(self.entry, results, higher)
            within = abs(np.mean(best - second)) <= 2 * stats.sem(best - second)
            assert bool(found.further) == within
            if found.chosen is not None:
                assert found.chosen == (0.003 if (best.mean() > second.mean()) == higher else 0.01)
            disputes += within
        assert 40 < disputes < 160

    def test_on_the_edge_of_noise_rounding_does_not_decide(self) -> None:
        assert plan.within_noise([0.595 - 0.585, 0.78 - 0.75]) and plan.within_noise([0.0, 0.0])  # 2 points, ± 1
        assert not plan.within_noise([0.011, 0.03])

    def test_a_second_rate_that_diverges_is_not_disputed(self) -> None:
        results = self.results({0.001: None, 0.003: None, 0.01: 0.5, 0.03: None})
        found = plan.tuning(self.entry, results, True)
        assert found.chosen == 0.01 and not found.further

    def test_only_settling_asks_for_further_seeds(self) -> None:
        results = self.disputed()
        wanted = [(self.entry, (0, 1))]
        tests = [self.entry.cell(0.01, seed) for seed in (0, 1)]
        assert plan.pending(wanted, results) == tests
        assert plan.pending(wanted, results, further=True)[:4] == plan.tuning(self.entry, results, True).further
        # What is settled is what is reported; a rule is run at LoRA's rate, and has none of its own.
        rule = plan.Entry(self.entry.task, next(iter(RULES.values())), 4.0)
        assert plan.stage(plan.SETTLING, results) == []
        results |= {cell: {"validation": 0.5, "parameters": 1} for cell in (tests[0], rule.cell(0.01, 0))}
        assert [entry for entry, _ in plan.stage(plan.SETTLING, results)] == [self.entry]

    def test_the_grid_ends(self) -> None:
        rates = [plan.rate(step) for step in range(-5, 2)]
        assert rates == [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
        found = plan.tuning(self.entry, self.results({rate: rate for rate in rates}), True)
        assert found.chosen == 3.0

    def test_what_can_be_reported_comes_seed_by_seed_before_rates_and_budgets_in_turn(self) -> None:
        other, large = (plan.Entry(self.entry.task, "DoRA", budget) for budget in (4.0, 16.0))
        new = plan.Entry(self.entry.task, "MiSS", 4.0)
        results = self.results({0.003: 0.3, 0.01: 0.5, 0.03: 0.4})
        results |= {
            point.cell(cell.rate, cell.seed): result for cell, result in results.items() for point in (other, large)
        }
        results[self.entry.cell(0.01, 0)] = {"validation": 0.5, "parameters": 1}
        wanted = [(point, (0, 1)) for point in (large, new, self.entry, other)]
        found = [(cell.method, cell.budget, cell.seed) for cell in plan.pending(wanted, results)]
        assert found[:3] == [("DoRA", 4.0, 0), (LORA, 4.0, 1), ("DoRA", 4.0, 1)]
        assert found[3:9] == [("MiSS", 4.0, seed) for seed in plan.TUNING_SEEDS for _ in range(3)]
        assert found[9:] == [("DoRA", 16.0, 0), ("DoRA", 16.0, 1)]
        assert not set(plan.TUNING_SEEDS) & set(plan.SEEDS["digits"])

    def test_a_method_above_the_budget_is_left_out(self) -> None:
        first = self.entry.cell(0.003, plan.TUNING_SEEDS[0])
        assert not plan.pending([(self.entry, (0,))], {first: {"validation": None, "parameters": None}})

    def test_ranking_averages_places_within_a_family_first(self) -> None:
        tasks = ["planted/low-rank", "planted/random", "digits/clean, 8 a class"]
        values = {"LoRA": (0.2, 0.2, 0.9), "DoRA": (0.1, 0.1, 0.7), "WaRA shared": (0.3, 0.3, 0.8)}
        results = {}
        entries = [plan.Entry(task, name, 4.0) for name in values for task in tasks]
        for entry in entries:
            value = values[entry.method][tasks.index(entry.task)]
            for rate, worse in ((0.003, True), (0.01, False), (0.03, True)):
                sign = 1 if entry.family == "planted" else -1
                for seed in plan.TUNING_SEEDS:
                    results[entry.cell(rate, seed)] = {"validation": value + sign * 0.05 * worse, "parameters": 1}
        # Planted: DoRA 0, LoRA ½, shared 1. Digits: LoRA 0, shared ½, DoRA 1. Means: LoRA ¼, DoRA ½, shared ¾.
        assert plan.ranking(results, entries) == ["LoRA", "DoRA", "WaRA shared"]

    def test_stage_four_takes_the_best_to_text_when_images_are_done(self) -> None:
        wanted = plan.stage_four({})
        assert {entry.family for entry, _ in wanted} == {"digits"} and {entry.budget for entry, _ in wanted} == {2, 8}
        names = list(dict.fromkeys(entry.method for entry, _ in wanted))
        results = {
            entry.cell(rate, seed): {
                "validation": names.index(entry.method) / 100 - 0.01 * (rate != 0.01),
                "parameters": 1,
            }
            for entry, seeds in wanted
            for rate in (0.003, 0.01, 0.03)
            for seed in (*plan.TUNING_SEEDS, *seeds)
        }
        text = [entry for entry, _ in plan.stage_four(results) if entry.family != "digits"]
        assert {entry.task for entry in text} == {"language/sympy", "docstrings/8 a class"}
        assert {entry.method for entry in text} == {LORA, plan.DEFAULT, *names[-4:]}

    def test_the_rule_is_run_at_the_rate_that_lora_chose(self) -> None:
        results = self.results({0.003: 0.3, 0.01: 0.5, 0.03: 0.4})
        cells = plan.rule_cells(results)
        assert {(entry.task, entry.method) for entry in cells} == {
            (self.entry.task, name) for pair in RULES.items() for name in pair
        }
        for by_seed in cells.values():
            assert [(seed, cell.seed, cell.rate) for seed, cell in by_seed.items()] == [(s, s, 0.01) for s in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run, begun with hardly any time, and then finished by two processes at once."""
    folder = tmp_path_factory.mktemp("quick") / "results"
    output = run_quick(folder, "--minutes", "0.05")
    assert "The time is over" in output and "more are known to be needed" in output
    assert cells_in(folder)
    both = f"""
import os, runpy, sys
sys.argv = ["run.py", "--quick", "--results", {str(folder)!r}]
child = os.fork()
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = run_python("-c", both)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
class TestQuickRun:
    def test_nothing_runs_twice(self, folder: Path) -> None:
        cells = cells_in(folder)
        assert len(cells) == len(set(cells)) > 80
        run_quick(folder)
        assert cells_in(folder) == cells

    def test_lines_say_what_was_run_and_where(self, folder: Path) -> None:
        for path in folder.glob("*.jsonl"):
            for line in map(json.loads, path.read_text().splitlines()):
                assert line["versions"]["torch"] == torch.__version__
                assert line["threads"] == 1 and line["seconds"] > 0
                assert line["validation"] is None or 0 <= line["validation"] < 10

    def test_every_method_has_its_reported_seeds_at_a_chosen_rate(self, folder: Path) -> None:
        results = Store(folder, folder / "locks").results()
        for entry, seeds in quick.wanted():
            chosen = plan.tuning(entry, results, quick.TASKS[entry.task].higher_is_better).chosen
            assert chosen is not None
            assert all(entry.cell(chosen, seed) in results for seed in seeds)
