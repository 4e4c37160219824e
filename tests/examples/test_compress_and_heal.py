"""The example of compressing and healing runs end to end at a tiny size; nothing here looks at how well."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

import pytest

from tests.examples.test_examples import EXAMPLES, ROOT, example, run

SCRIPT = EXAMPLES / "compress_and_heal.py"
RESULTS = ROOT / "benchmarks" / "results"
OUTPUT = "new/folder/quick"


def task_of(line: dict) -> str:
    return line["task"].partition("/")[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("quick")
    return run(SCRIPT, "--quick", "--output-dir", "new/folder", directory=folder), folder


@pytest.fixture(scope="module")
def lines(quick: tuple[subprocess.CompletedProcess[str], Path]) -> list[dict]:
    assert quick[0].returncode == 0, quick[0].stderr
    return [json.loads(line) for line in (quick[1] / OUTPUT / "compress_and_heal.jsonl").read_text().splitlines()]


@pytest.mark.slow
class TestQuickRun:
    def test_each_way_is_measured_within_its_budget(self, lines: list[dict]) -> None:
        for task in ("MiniLM", "byte-level Llama"):
            own = [line for line in lines if task_of(line) == task]
            assert len(own) == 1 + 2 * 4 + 1 + 2 * 6
            (dense,) = (line for line in own if line["solver"] == "dense")
            for line in own:
                if line is not dense:
                    most = 0.55 if line["allocation"] == "cost" else line["budget"]  # by cost the budget is of that
                    assert 0.3 < line["share_of_targets"] <= most
                    assert line["parameters"] < dense["parameters"]

    def test_adapters_have_as_many_parameters(self, lines: list[dict]) -> None:
        by = {(task_of(line), line["solver"], line["healed_with"]): line["adapter_parameters"] for line in lines}
        for task in ("MiniLM", "byte-level Llama"):
            for solver in ("svd", "activation"):
                lora, factors, layers = (
                    by[task, solver, f"{name} on {where}"]
                    for name, where in (("LoRA", "factors"), ("WaRA", "factors"), ("WaRA", "layers"))
                )
                assert lora <= factors < 1.01 * lora  # odd ranks round up
                assert 0.9 * lora < layers <= lora

    def test_tables_picture_and_resuming(
        self, quick: tuple[subprocess.CompletedProcess[str], Path], lines: list[dict]
    ) -> None:
        done, folder = quick
        svd = [line for line in lines if task_of(line) == "MiniLM" and line["solver"] == "svd"]
        scores = {(line["healed_with"], line["seed"]): line["test"] for line in svd if line["healed_with"]}
        differences = [scores["WaRA on layers", seed] - scores["LoRA on factors", seed] for seed in (0, 1)]
        of_minilm = done.stdout.split("byte-level Llama**")[0].splitlines()
        (row,) = (row for row in of_minilm if row.startswith("| svd | uniform | WaRA on layers |"))
        assert f"| {statistics.mean(differences):+.2f} ± " in row
        assert (folder / OUTPUT / "compress_and_heal.png").read_bytes().startswith(b"\x89PNG")
        results = folder / OUTPUT / "compress_and_heal.jsonl"
        kept = results.read_text().splitlines()
        results.write_text("\n".join(kept[:-1]) + "\n")
        again = run(SCRIPT, "--quick", "--output-dir", "new/folder", directory=folder)
        assert again.returncode == 0, again.stderr
        resumed = results.read_text().splitlines()
        last, before = json.loads(resumed[-1]), json.loads(kept[-1])
        assert resumed[:-1] == kept[:-1]
        assert {**last, "seconds": 0} == {**before, "seconds": 0, "test": pytest.approx(before["test"], rel=1e-3)}


def test_rates_are_those_that_other_seeds_chose() -> None:
    script, report = example("compress_and_heal"), example("compress_report")
    lines = [json.loads(line) for line in (RESULTS / "compress_and_heal.jsonl").read_text().splitlines()]
    tuning = [line for line in lines if line["seed"] in report.TUNING_SEEDS]
    assert len(tuning) == 2 * 2 * 3 * len(script.RATES) * len(report.TUNING_SEEDS)
    means = report.tuned(tuning)
    for (task, method), chosen in script.CHOSEN.items():
        best = min if task == "byte-level Llama" else max
        assert chosen == best(script.RATES, key=lambda rate: means[task, method, rate])
    assert not set(report.TUNING_SEEDS) & set(report.SEEDS)
    for line in lines:
        if line["seed"] in report.SEEDS:
            assert line["rate"] == script.CHOSEN.get((task_of(line), line["healed_with"]), 0)


@pytest.mark.slow
def test_a_file_for_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(SCRIPT, "--output-dir", "file", directory=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert "compress_and_heal.py: error: --output-dir file cannot be used as a folder" in result.stderr
