"""The benchmarks run end to end; nothing here looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_time(tmp_path):
    script, output = ROOT / "benchmarks" / "import_time.py", tmp_path / "new" / "result.json"
    result = subprocess.run(
        [sys.executable, str(script), "--processes", "1", "--output", str(output)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(output.read_text())
    assert measured == json.loads(result.stdout)
    assert measured.keys() == json.loads((ROOT / "benchmarks" / "results" / "import_time.json").read_text()).keys()


def test_grid_step(tmp_path):
    script, output = ROOT / "benchmarks" / "grid_step.py", tmp_path / "result.json"
    sizes = ["--blocks", "1", "--batch", "1", "--repeats", "1"]
    result = subprocess.run(
        [sys.executable, str(script), *sizes, "--output", str(output)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(output.read_text())
    assert measured == json.loads(result.stdout)
    assert measured.keys() == json.loads((ROOT / "benchmarks" / "results" / "grid_step.json").read_text()).keys()
    assert measured["total_rank"] == 16
    assert all(len(ratios) == 1 for ratios in measured["ratios_to_lora"].values())
