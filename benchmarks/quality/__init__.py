"""Which adapter learns most from its parameters: tasks, methods, and a runner that keeps every result.

`run.py` and `report.py` are the scripts; they put the folder `benchmarks` first on the path, so that the parts are
imported as `quality.cells`, and `harness` as the other benchmarks import it.
"""

import sys
from pathlib import Path

# The examples are scripts that import one another by their bare names, and have the data and models used here.
sys.path.append(str(Path(__file__).parents[2] / "examples"))
