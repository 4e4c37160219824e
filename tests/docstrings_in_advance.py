"""Parses the docstrings that the examples learn from, which takes five seconds, before processes are forked."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from docstring_data import load_docstrings

load_docstrings()
