"""The benchmarks run end to end, at tiny sizes; nothing here looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# script, and the options that make it small
SCRIPTS = {
    "import_time": ["--processes", "1"],
    "export_time": ["--smoke", "--rounds", "2"],
    "merge_memory": ["--smoke"],
    **{
        name: ["--smoke", "--rounds", "2"]
        for name in ("step_time", "layer_cost", "decode", "injection_time", "transform_time", "grid_step")
    },
    "memory": ["--smoke"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_wara_bench_smoke(name, tmp_path):
    script, output = ROOT / "benchmarks" / f"{name}.py", tmp_path / "new" / "result.json"
    result = subprocess.run(
        [sys.executable, str(script), *SCRIPTS[name], "--output", str(output)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(output.read_text())
    kept = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert measured.keys() == kept.keys()
