"""What the quality suite says of its results: intervals, paired differences, tables and pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.forked_python import run_python

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import summary  # noqa: E402
from quality import comparison, plan  # noqa: E402
from quality import report as quality_report  # noqa: E402
from quality.cells import Cell  # noqa: E402
from quality.figures import MARKERS, pareto  # noqa: E402
from quality.methods import LORA, METHODS  # noqa: E402
from quality.reported import compared, pooled, reported  # noqa: E402
from quality.tasks import TASKS  # noqa: E402


def test_every_group_that_is_reported_has_a_marker() -> None:
    assert {method.group for method in METHODS.values()} - {"rule"} == MARKERS.keys()


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
        assert (rows["MiSS"].tasks, rows["DoRA"].tasks) == (1, 2)

    def test_a_run_that_diverged_is_told_and_no_figure(self) -> None:
        results = self.results()
        results[plan.Entry("digits/clean, 8 a class", "DoRA", 4.0).cell(0.01, 3)] |= {"test": None}
        rows = {row.method: row for row in reported(results)["digits/clean, 8 a class"]}
        assert rows["DoRA"].diverged == 1 and 3 not in rows["DoRA"].tests
        assert rows[LORA].diverged == 0


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
        noise = np.random.default_rng(0).normal(0, 0.01, 8).mean()
        places = []
        for container, value in zip(panel.containers, (0.35, 0.45 + noise, 0.35 + 5 * noise), strict=True):
            ((place, height),) = container.lines[0].get_xydata().tolist()
            assert height == pytest.approx(value)
            places.append(place / 7)
        # Side by side, around the parameters that they share.
        assert places == sorted(set(places)) and 0.9 < places[0] < 1 < places[-1] < 1.1

    def test_stages_that_wait_for_another_say_so(self) -> None:
        table = quality_report.progress_table(self.results())
        assert "| 2 | 0 | stage 1 has " in table
        with pytest.raises(ValueError, match=r"run `run\.py --stage 1` first"):
            plan.stage(2, self.results())

    @pytest.mark.slow
    def test_tables_in_the_readme_are_what_the_results_say(self) -> None:
        done = run_python(BENCHMARKS / "quality" / "report.py", "--check")
        assert done.returncode == 0, done.stderr


class TestSummary:
    def test_columns_are_of_the_methods_that_were_run_and_cells_are_differences_to_lora(self, monkeypatch) -> None:
        runs = {
            (method, seed, rate): {"validation": value, "test": value + seed / 100, "parameters": 7}
            for method, best in ((LORA, 0.4), ("WaveFT", 0.6), ("GraLoRA", 0.3))
            for seed in (*plan.TUNING_SEEDS, *range(8))
            for rate, value in ((0.003, 0.1), (0.01, best), (0.03, 0.1))
        }
        results = {
            Cell(task, method, 4.0, rate, seed): result
            for (method, seed, rate), result in runs.items()
            for task in TASKS
            if task.startswith("digits-long/")
        }
        monkeypatch.setattr(summary.Store, "results", lambda store: results)
        header, _, row = summary.summary_table().splitlines()
        assert header.count("|") == row.count("|") == 6
        assert header.endswith("| LoRA | GraLoRA | WaveFT |") and "rsLoRA" not in header and "MiSS" not in header
        assert row.endswith("| LoRA r=4 | 43.5 | **-10.0 ± 0.0** | **+20.0 ± 0.0** |")
