"""The example of compressing and healing runs end to end at a tiny size; nothing here looks at how well."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from test_examples import EXAMPLES, run

SCRIPT = EXAMPLES / "compress_and_heal.py"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("quick")
    return run(SCRIPT, "--quick", "--output", "new/folder", directory=folder, timeout=400), folder


@pytest.fixture(scope="module")
def rows(quick: tuple[subprocess.CompletedProcess[str], Path]) -> list[dict]:
    assert quick[0].returncode == 0, quick[0].stderr
    return json.loads((quick[1] / "new/folder/compress_and_heal.json").read_text())["rows"]


@pytest.mark.slow
class TestQuickRun:
    def test_each_way_is_measured_within_its_budget(self, rows: list[dict]) -> None:
        for task in ("MiniLM", "byte-level Llama"):
            own = [row for row in rows if row["task"] == task]
            assert len(own) == 1 + 2 * 4 + 1 + 2 * 3
            (dense,) = (row for row in own if row["solver"] == "dense")
            for row in own:
                if row is not dense:
                    most = 0.55 if row["allocation"] == "cost" else row["budget"]  # by cost the budget is of that
                    assert 0.3 < row["share_of_targets"] <= most
                    assert row["parameters"] < dense["parameters"]
                assert (row["interval"] is not None) == bool(row["method"])
                assert len(row["values"]) == (2 if row["method"] else 1)

    def test_adapters_have_as_many_parameters(self, rows: list[dict]) -> None:
        by = {(row["task"], row["solver"], row["method"]): row["adapter_parameters"] for row in rows if row["method"]}
        for task in ("MiniLM", "byte-level Llama"):
            for solver in ("svd", "activation"):
                lora, factors, layers = (
                    by[task, solver, f"{name} on {where}"]
                    for name, where in (("LoRA", "factors"), ("WaRA", "factors"), ("WaRA", "layers"))
                )
                assert lora <= factors < 1.01 * lora  # odd ranks round up
                assert 0.9 * lora < layers <= lora

    def test_table_picture_and_resuming(
        self, quick: tuple[subprocess.CompletedProcess[str], Path], rows: list[dict]
    ) -> None:
        done, folder = quick
        assert "MiniLM: accuracy in %" in done.stdout and "WaRA on layers" in done.stdout
        output = folder / "new/folder"
        assert (output / "compress_and_heal.png").read_bytes().startswith(b"\x89PNG")
        results = output / "results.jsonl"
        lines = results.read_text().splitlines()
        assert len(lines) == 1 + 2 * (1 + 2 * 4 + 1 + 2 * 6)
        results.write_text("\n".join(lines[:-1]) + "\n")
        again = run(SCRIPT, "--quick", "--output", "new/folder", directory=folder, timeout=400)
        assert again.returncode == 0, again.stderr
        resumed = results.read_text().splitlines()
        last, before = json.loads(resumed[-1]), json.loads(lines[-1])
        assert resumed[:-1] == lines[:-1]
        assert {**last, "seconds": 0} == {**before, "seconds": 0, "value": pytest.approx(before["value"], rel=1e-3)}

    def test_other_options_are_told(self, quick: tuple[subprocess.CompletedProcess[str], Path], rows: list) -> None:
        again = run(SCRIPT, "--output", "new/folder", directory=quick[1])
        assert again.returncode == 1
        assert "results.jsonl is of a run with" in again.stderr and "Choose another --output" in again.stderr
        assert "Traceback" not in again.stderr


@pytest.mark.slow
def test_a_file_for_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(SCRIPT, "--output", "file", directory=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert "compress_and_heal.py: error: --output file cannot be used as a folder" in result.stderr
