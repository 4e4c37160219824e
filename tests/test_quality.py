"""The quality suite: what a cell costs is not looked at, nor how well a method does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from scipy import stats
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from quality import comparison, plan, quick  # noqa: E402
from quality import report as quality_report  # noqa: E402
from quality.cells import Cell, Store  # noqa: E402
from quality.figures import pareto  # noqa: E402
from quality.methods import LORA, METHODS, RULES, adapter_size, largest, wara_ladder  # noqa: E402
from quality.reported import compared, pooled, reported  # noqa: E402
from quality.tasks import TASKS  # noqa: E402
from quality.tasks.digits import Digits, images, seen_as  # noqa: E402
from quality.tasks.planted import CHANGES, Planted, weight_rows  # noqa: E402
from quality.training import Built, train, trained_parameters  # noqa: E402

SIZED = [name for name, method in METHODS.items() if method.sized and method.group != "rule"]
QUALITY = BENCHMARKS / "quality"
CELL = Cell("digits/clean, 8 a class", LORA, 4.0, 0.01, 0)


def run_quick(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(QUALITY / "run.py"), "--quick", "--results", str(folder), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def cells_in(folder: Path) -> list[Cell]:
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [Cell(*(line[name] for name in ("task", "method", "budget", "rate", "seed"))) for line in lines]


class TestComparison:
    def test_interval_is_scipys(self) -> None:
        values = np.random.default_rng(0).normal(size=8).tolist()
        low, high = stats.t.interval(0.95, 7, loc=np.mean(values), scale=stats.sem(values))
        assert comparison.interval(values) == pytest.approx((high - low) / 2)

    def test_paired_difference_is_scipys_over_common_seeds(self) -> None:
        first, second = (dict(enumerate(draw)) for draw in np.random.default_rng(1).normal(size=(2, 9)))
        del first[3], second[5]
        found = comparison.paired(first, second)
        common = [0, 1, 2, 4, 6, 7, 8]
        expected = stats.ttest_rel([first[s] for s in common], [second[s] for s in common])
        assert found.pairs == 7
        assert found.p == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval()
        assert (found.mean - found.interval, found.mean + found.interval) == pytest.approx(
            (interval.low, interval.high)
        )

    def test_pairs_without_spread_or_too_few(self) -> None:
        assert comparison.paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1
        assert comparison.paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p == 0
        assert comparison.paired({0: 1.0}, {0: 2.0, 1: 1.0}) is None

    def test_holm_by_hand(self) -> None:
        # Sorted .01 .02 .03 .04: 4 · .01 = .04, 3 · .02 = .06, then 2 · .03 = .06, and .04, which may not fall again.
        found = comparison.holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.02})
        assert found == pytest.approx({"b": 0.04, "d": 0.06, "c": 0.06, "a": 0.06})
        assert comparison.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


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
        # A perplexity is the better the lower, and a run that did not end the worst.
        found = plan.tuning(self.entry, self.results({0.003: 9.0, 0.01: 8.0, 0.03: None}), False)
        assert found.chosen == 0.01
        # Equal everywhere: the middle, and no more runs.
        assert plan.tuning(self.entry, self.results({0.003: 1.0, 0.01: 1.0, 0.03: 1.0}), True).chosen == 0.01

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

    def test_the_rule_is_run_at_the_rate_that_lora_chose(self) -> None:
        results = self.results({0.003: 0.3, 0.01: 0.5, 0.03: 0.4})
        cells = plan.rule_cells(results)
        assert {(entry.task, entry.method) for entry in cells} == {
            (self.entry.task, name) for pair in RULES.items() for name in pair
        }
        for by_seed in cells.values():
            assert [(seed, cell.seed, cell.rate) for seed, cell in by_seed.items()] == [(s, s, 0.01) for s in range(8)]


class TestReported:
    def results(self) -> dict[Cell, dict]:
        """Two tasks: DoRA is above LoRA by 0.1 on one, by 0.2 on the other, up to noise; MiSS has one task."""
        noise = dict(enumerate(np.random.default_rng(0).normal(0, 0.01, 8).tolist()))
        tasks = ("digits/clean, 8 a class", "digits/shifted, 8 a class")
        found: dict[Cell, dict] = {}
        for task, add in zip(tasks, (0.1, 0.2), strict=True):
            for method in (LORA, "DoRA", "MiSS"):
                if method == "MiSS" and task == tasks[1]:
                    continue
                entry = plan.Entry(task, method, 4.0)
                for rate, value in ((0.003, 0.3), (0.01, 0.5), (0.03, 0.4)):
                    for seed in plan.TUNING_SEEDS:
                        found[entry.cell(rate, seed)] = {
                            "validation": value,
                            "test": 0.9,
                            "parameters": 7,
                            "seconds": 1,
                        }
                for seed, value in noise.items():
                    # Seeds differ more than methods: only pairs tell them apart.
                    test = seed / 10 + {LORA: 0.0, "DoRA": add + value, "MiSS": 5 * value}[method]
                    found[entry.cell(0.01, seed)] = {"validation": 0.5, "test": test, "parameters": 7, "seconds": 1}
        return found

    def test_only_seeds_that_chose_nothing_are_reported_and_differences_are_paired(self) -> None:
        found = reported(self.results())
        rows = {item.row.method: item for item in compared(found["digits/clean, 8 a class"])}
        assert rows[LORA].difference is None and rows[LORA].adjusted is None
        assert rows[LORA].row.tests == {seed: seed / 10 for seed in range(8)}
        noise = np.random.default_rng(0).normal(0, 0.01, 8)
        expected = stats.ttest_1samp(0.1 + noise, 0)
        assert rows["DoRA"].difference.mean == pytest.approx(0.1 + noise.mean())
        assert rows["DoRA"].difference.p == pytest.approx(expected.pvalue)
        assert rows["DoRA"].adjusted == pytest.approx(2 * expected.pvalue)
        assert rows["MiSS"].adjusted == rows["MiSS"].difference.p

    def test_tasks_of_a_family_are_pooled_by_seed_over_those_a_method_has(self) -> None:
        found = reported(self.results())
        rows = {item.row.method: item for item in pooled(found, "digits")}
        noise = np.random.default_rng(0).normal(0, 0.01, 8)
        assert rows["DoRA"].difference.mean == pytest.approx(0.15 + noise.mean())
        assert rows["DoRA"].difference.p == pytest.approx(stats.ttest_1samp(0.15 + noise, 0).pvalue)
        assert rows["MiSS"].difference.mean == pytest.approx(5 * noise.mean())
        assert rows["MiSS"].row.task == "digits (1)"

    def test_a_run_that_diverged_is_told_and_no_figure(self) -> None:
        results = self.results()
        results[plan.Entry("digits/clean, 8 a class", "DoRA", 4.0).cell(0.01, 3)] |= {"test": None}
        rows = {row.method: row for row in reported(results)["digits/clean, 8 a class"]}
        assert rows["DoRA"].diverged == 1 and 3 not in rows["DoRA"].tests
        assert rows[LORA].diverged == 0


class TestMethods:
    problem = Digits(8, "clean", 8, 3, pretraining_epochs=1)

    def test_ladder_fills_coarse_levels_first(self) -> None:
        assert wara_ladder(1, 6) == {"aa1": 2, "dd1": 2, "ad1": 1, "da1": 1}
        assert wara_ladder(2, 5) == {"aa2": 1, "dd2": 1, "ad2": 1, "da2": 1, "dd1": 1, "ad1": 0, "da1": 0}

    @pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 7, 8, 100])
    def test_largest_size(self, limit: int) -> None:
        assert largest(lambda size: size <= limit) == limit

    @pytest.mark.slow
    @pytest.mark.parametrize("budget", [1.0, 4.0])
    @pytest.mark.parametrize(
        "name", [name for name, method in METHODS.items() if method.sized and method.group != "rule"]
    )
    def test_methods_are_matched_to_loras_parameters(self, name: str, budget: float) -> None:
        problem = self.problem.problem(0)
        # Layers of the ViT: three, each with four of 64 × 64, one of 64 × 128 and one of 128 × 64.
        lora = int(budget) * 3 * (4 * 128 + 2 * 192)
        assert adapter_size(problem, LoraConfig(r=int(budget))) == lora
        built = METHODS[name].build(problem, budget)
        if built is None:
            assert (name, budget) in {("DoRA", 1.0), ("low-rank attention", 1.0)}
            return
        assert built.parameters <= 1.04 * lora
        # A tiny core grows by whole squares, DoRA by ranks that cost a quarter, VeRA by vectors.
        assert built.parameters >= (0.85 if budget == 4 else 0.6) * lora
        if name != "AdaLoRA":  # which starts with more, and is cut to its budget
            assert trained_parameters(built.model, problem.head) == built.parameters
        head = [p for n, p in built.model.named_parameters() if p.requires_grad and "classifier" in n]
        assert sum(p.numel() for p in head) == 64 * 5 + 5

    def test_ends(self) -> None:
        problem = self.problem.problem(0)
        assert METHODS["frozen"].build(problem, 0).parameters == 0
        trained = {name for name, p in problem.model.named_parameters() if p.requires_grad}
        assert trained == {"classifier.weight", "classifier.bias"}
        problem = self.problem.problem(0)
        whole = sum(p.numel() for p in problem.model.parameters())
        assert METHODS["full fine-tuning"].build(problem, 0).parameters == whole - 64 * 5 - 5

    def test_low_rank_attention_of_full_rank_and_linformer_start_from_the_weights(self) -> None:
        problem = self.problem.problem(0)
        rows = {"pixel_values": problem.splits["test"]["pixel_values"][:4]}
        with torch.no_grad():
            expected = problem.model.eval()(**rows).logits
            replaced = METHODS["low-rank attention"].replace(problem, problem.model, 64).eval()
            assert torch.allclose(replaced(**rows).logits, expected, atol=1e-5)
        problem = self.problem.problem(0)
        weight = problem.model.vit.layers[1].attention.k_proj.weight.clone()
        replaced = METHODS["Linformer"].replace(problem, problem.model, 7)
        assert torch.equal(replaced.vit.layers[1].attention.attention.k_proj.weight, weight)
        assert trained_parameters(replaced, problem.head) == 3 * 2 * 65 * 7

    def test_adalora_is_cut_to_its_rank(self) -> None:
        problem = Planted("low-rank", 60).problem(0)
        built = METHODS["AdaLoRA"].build(problem, 4.0)
        assert train(problem, built, 0.03)
        values = next(p for name, p in built.model.named_parameters() if "lora_E" in name)
        assert (len(values), int(values.count_nonzero())) == (6, 4)

    def test_eva_looks_at_the_data(self) -> None:
        problem = Planted("low-rank", 10).problem(0)
        batch = next(problem.batches())["inputs"]
        built = METHODS["LoRA, EVA"].build(problem, 1.0)
        rows = next(p for name, p in built.model.named_parameters() if "lora_A" in name)
        random = torch.randn(100, 64)
        share = (batch @ rows[0] / rows[0].norm()).square().mean()
        assert share > 1.2 * (random @ rows[0] / rows[0].norm()).square().mean()

    @pytest.mark.parametrize("name", RULES)
    def test_the_rule_scales_alone(self, name: str) -> None:
        plain, scaled = (METHODS[of].build(Planted("random", 2).problem(0), 4.0) for of in (name, RULES[name]))
        configs = [built.model.peft_config["default"] for built in (plain, scaled)]
        factor = 2 if configs[0].levels == 3 else 1 / 0.7
        layers = [built.model.base_model.model.layer for built in (plain, scaled)]
        assert [layer.scaling["default"] for layer in layers] == pytest.approx([1, factor])
        assert configs[0].subband_ranks == configs[1].subband_ranks and plain.parameters == scaled.parameters


class TestTasks:
    @pytest.mark.parametrize("task", [Digits(8, "inverted", 8, 3, pretraining_epochs=1), Planted("block-local", 3)])
    def test_methods_share_base_head_data_and_order_at_a_seed(self, task: Digits | Planted) -> None:
        first, second, other = task.problem(1), task.problem(1), task.problem(2)
        for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        inputs = "pixel_values" if isinstance(task, Digits) else "inputs"
        batches = list(zip(first.batches(), second.batches(), other.batches(), strict=True))
        assert len(batches) == 3
        for a, b, c in batches:
            assert torch.equal(a[inputs], b[inputs]) and not torch.equal(a[inputs], c[inputs])

    def test_splits_of_digits_are_apart_and_balanced(self) -> None:
        splits = Digits(8, "clean", 8, 3, pretraining_epochs=1).problem(0).splits
        assert {name: len(rows["labels"]) for name, rows in splits.items()} == {
            "train": 40,
            "validation": 200,
            "test": 300,
        }
        assert splits["train"]["labels"].bincount().tolist() == [8] * 5
        everything = images(5, 9)[0].flatten(1)
        places = [
            {int((everything == image.flatten()).all(1).nonzero()[0]) for image in rows["pixel_values"]}
            for rows in splits.values()
        ]
        assert not (places[0] & places[1] or places[0] & places[2] or places[1] & places[2])

    def test_domains(self) -> None:
        pixels = images(5, 9)[0][:50]
        generator = torch.Generator().manual_seed(0)
        noise = seen_as("inverted", pixels, generator) + pixels
        assert noise.std().item() == pytest.approx(0.4, abs=0.01)
        moved = seen_as("shifted", pixels, generator)
        assert not torch.equal(moved, pixels)
        inner = moved[:, :, 1:-1, 1:-1]
        parts = [
            pixels[:, 0, 1 + down : 15 + down, 1 + right : 15 + right] for down in (-1, 0, 1) for right in (-1, 0, 1)
        ]
        found = torch.stack([(inner[:, 0] == part).all((1, 2)) for part in parts])
        assert found.any(0).all() and found.any(1).all()  # each image is one of the nine, and each of the nine occurs

    @pytest.mark.parametrize("kind", CHANGES)
    def test_planted_changes_have_mean_square_one(self, kind: str) -> None:
        inputs, outputs = weight_rows(CHANGES[kind](), 20_000)
        assert outputs.square().mean().item() == pytest.approx(1, rel=0.05)
        assert inputs.square().mean().item() == pytest.approx(1, rel=0.01)

    def test_structure_of_planted_changes(self) -> None:
        assert torch.linalg.matrix_rank(CHANGES["low-rank"]()) == 8
        local = CHANGES["block-local"]()
        assert torch.equal(local * torch.block_diag(*[torch.ones(8, 8)] * 8), local)
        # Scales of 1, 2, 4, 8 and 16 channels: the means over blocks of 16 hold most of the coarsest.
        multi = CHANGES["multi-scale"]()
        coarse = nn.functional.avg_pool2d(multi[None], 16)[0]
        assert 16 * coarse.norm() > 0.8

    def test_error_is_zero_at_the_planted_change_and_one_before(self) -> None:
        problem = Planted("spatial filter", 2).problem(0)
        rows = problem.splits["test"]
        assert problem.score(problem.model, rows) == pytest.approx(1, abs=0.1)
        problem = Planted("random", 2).problem(0)
        rows = problem.splits["train"]
        solution = torch.linalg.lstsq(rows["inputs"], rows["labels"]).solution.T
        problem.model.layer.weight.data = solution
        assert problem.score(problem.model, problem.splits["test"]) < 0.01

    def test_every_task_has_seeds_and_names_are_apart(self) -> None:
        assert {task.name.partition("/")[0] for task in TASKS.values()} <= plan.SEEDS.keys()
        assert all(name == task.name for name, task in TASKS.items())


class TestTraining:
    def test_a_run_that_diverges_is_told(self) -> None:
        problem = Planted("random", 5).problem(0)
        assert not train(problem, Built(problem.model, 0), float("inf"))

    def test_least_squares_is_found(self) -> None:
        problem = Planted("random", 300).problem(0)
        assert train(problem, METHODS["full fine-tuning"].build(problem, 0), 0.01)
        assert problem.score(problem.model, problem.splits["test"]) < 0.1


class TestReport:
    results = TestReported.results

    def test_tables_show_the_paired_difference_in_points_and_whether_it_is_significant(self) -> None:
        found = reported(self.results())
        noise = np.random.default_rng(0).normal(0, 0.01, 8)
        expected = stats.ttest_1samp(0.1 + noise, 0)
        interval = expected.confidence_interval()
        middle, half = 100 * (0.1 + noise.mean()), 50 * (interval.high - interval.low)
        name = "digits/clean, 8 a class"
        table = quality_report.paired_tables({name: found[name]})
        (line,) = [line for line in table.splitlines() if "| DoRA | 7 | 0.01 |" in line]
        assert f"| **{middle:+.1f} ± {half:.1f}** better | 0.000 | 0.000 | 8 |" in line
        assert f"| LoRA r=4 | {LORA} | 7 | 0.01 | 35.0 ± " in table
        # The planted error is the better the lower: what is significantly above LoRA's is worse.
        worse = quality_report.row_of(compared(found["digits/clean, 8 a class"])[1], "planted", False)
        assert f"**{middle / 100:+.3f} ± {half / 100:.3f}** worse" in worse

    def test_pictures_have_points_at_the_parameters_and_intervals(self) -> None:
        found = reported(self.results())
        task = TASKS["digits/clean, 8 a class"]
        figure = pareto([task], found, {name: method.group for name, method in METHODS.items()})
        panel = figure.axes[0]
        assert panel.get_xscale() == "log" and panel.get_title() == task.name
        points = [container.lines[0].get_xydata().tolist() for container in panel.containers]
        noise = np.random.default_rng(0).normal(0, 0.01, 8).mean()
        assert points == [[[7, pytest.approx(value)]] for value in (0.35, 0.45 + noise, 0.35 + 5 * noise)]

    def test_stages_that_wait_for_another_say_so(self) -> None:
        table = quality_report.progress_table(self.results())
        assert "| 2 | 0 | stage 1 has " in table
        with pytest.raises(ValueError, match=r"run `run\.py --stage 1` first"):
            plan.stage(2, self.results())

    @pytest.mark.slow
    def test_tables_in_the_readme_are_what_the_results_say(self) -> None:
        command = [sys.executable, str(QUALITY / "report.py"), "--check"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run, begun with hardly any time, and then finished by two processes at once."""
    folder = tmp_path_factory.mktemp("quick") / "results"
    begun = run_quick(folder, "--minutes", "0.05")
    output = begun.communicate()[0]
    assert begun.returncode == 0, output
    assert "The time is over" in output and "more are known to be needed" in output
    assert cells_in(folder)
    for process in [run_quick(folder) for _ in range(2)]:
        output = process.communicate()[0]
        assert process.returncode == 0, output
    return folder


@pytest.mark.slow
class TestQuickRun:
    def test_nothing_runs_twice(self, folder: Path) -> None:
        cells = cells_in(folder)
        assert len(cells) == len(set(cells)) > 80
        again = run_quick(folder)
        again.communicate()
        assert again.returncode == 0
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
