"""The benchmarks run end to end, at tiny sizes; nothing here looks at a time."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMOKE = ["--smoke", "--rounds", "2"]
# script, and the options that make it small
SCRIPTS = {
    "import_time": ["--processes", "1"],
    "merge_memory": ["--smoke"],
    "memory": ["--smoke"],
    "launches": ["--smoke"],
    **dict.fromkeys(
        (
            "decode",
            "export_time",
            "grid_step",
            "injection_time",
            "joint_projections",
            "layer_cost",
            "step_time",
            "transform_time",
        ),
        SMOKE,
    ),
}


@pytest.fixture
def run(monkeypatch):
    """Run a script of the folder as the main program, in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # The processes that import_time and merge_memory start find the package as this one does.
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))

    def main(name: str, *options: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")

    return main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:levels=. is more than is useful")
@pytest.mark.parametrize("name", SCRIPTS)
def test_wara_bench_smoke(name, run, tmp_path, capsys):
    output = tmp_path / "new" / "result.json"
    run(name, *SCRIPTS[name], "--output", output)
    measured = json.loads(output.read_text())
    assert measured == json.loads(capsys.readouterr().out)
    kept = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    assert measured.keys() == kept.keys()


def test_there_is_a_smoke_test_of_each_script():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"harness", "models", "report"}
    results = {path.stem for path in (BENCHMARKS / "results").glob("*.json")} - {"compare_attention"}
    assert scripts == SCRIPTS.keys() == results


def test_tables_are_what_the_results_say():
    done = subprocess.run([sys.executable, BENCHMARKS / "report.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
