"""Parses docstrings that the examples learn from, before processes are forked.

All files of the packages would take ten seconds. A process that is no fork parses them all.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import docstring_data

docstring_data._MAX_FILES = 50
docstring_data.load_docstrings()
