"""Running a program that cannot be edited, in processes that know WaRA."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

STARTUP = str(Path(__file__).parent / "startup")


def command(program: str, arguments: Sequence[str], is_module: bool) -> list[str]:
    """What to execute: this Python with a script or module, or a command of its environment or on the PATH.

    Raises:
        FileNotFoundError: there is neither a script nor a command of that name.
    """
    if is_module:
        return [sys.executable, "-m", program, *arguments]
    path = Path(program)
    if path.is_file() or (path / "__main__.py").is_file():
        return [sys.executable, program, *arguments]
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(program, path=places)
    if found is None:
        raise FileNotFoundError(f"There is no script {program!r}, and no command of that name. A module needs -m.")
    return [found, *arguments]


def environment(before: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Python, and every Python that it starts, imports `wara_peft` right after `peft`."""
    others = [path for path in before.get("PYTHONPATH", "").split(os.pathsep) if path and path != STARTUP]
    return {**before, "PYTHONPATH": os.pathsep.join([STARTUP, *others])}
