"""How long does `import wara_peft` take after `import peft`, in one process?

    python benchmarks/import_time.py

Prints the median over fresh processes, and the share of the time that `import peft` itself takes; writes both with the
versions they belong to into benchmarks/results/import_time.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "import_time.json"
CODE = """
from time import perf_counter
start = perf_counter()
import peft, peft.tuners
middle = perf_counter()
import wara_peft
print(middle - start, perf_counter() - middle)
"""


def measure(processes: int) -> dict[str, object]:
    """Median seconds of both imports over that many fresh processes."""
    runs = []
    for _ in range(processes):
        result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        runs.append([float(value) for value in result.stdout.split()])
    peft_seconds, wara_seconds = (statistics.median(values) for values in zip(*runs, strict=True))
    return {
        "import_peft_seconds": round(peft_seconds, 3),
        "import_wara_peft_seconds": round(wara_seconds, 3),
        "ratio": round(wara_seconds / peft_seconds, 4),
        "processes": processes,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers", "PyWavelets")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=7, help="fresh processes to measure (default: 7)")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    options = parser.parse_args()
    measured = measure(options.processes)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))
