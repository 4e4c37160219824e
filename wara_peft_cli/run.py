"""`wara-peft run`: lets a program that does not import `wara_peft` load WaRA adapters and compressed models.

With `--reparametrize-lora` every LoRA that trains in the program does so in the wavelet domain.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .interruption import PROGRAM
from .options import check_wavelet
from .terminal import failures_in_a_line

# Python imports the file `sitecustomize.py` in this folder when it starts, if the folder is on PYTHONPATH.
STARTUP = str(Path(__file__).parent / "startup")
REPARAMETRIZE = "WARA_PEFT_REPARAMETRIZE_LORA"
"""The environment variable that `wara_peft.lora.automatic` reads."""
PYTHON_ENDINGS = (".py", ".pyw", ".pyc", ".pyz")
EXAMPLES = f"""Examples:\n
    {PROGRAM} run evaluate.py --adapter my-adapter\n
    {PROGRAM} run -m lm_eval --model hf --model_args pretrained=my-base-model,peft=my-adapter\n
    {PROGRAM} run accelerate launch train.py\n
    {PROGRAM} run --reparametrize-lora --wavelet db2 trl sft --use_peft --model_name_or_path my-base-model"""


def run(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="A Python script, or any other program.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Handed on as they are.")] = None,
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module, as in python -m.")] = False,
    reparametrize_lora: Annotated[
        bool,
        typer.Option(
            "--reparametrize-lora",
            help="Let every LoRA that trains do so in the wavelet domain, with half of its parameters at one level.",
        ),
    ] = False,
    wavelet: Annotated[
        str | None, typer.Option(help="With --reparametrize-lora: an orthogonal wavelet; haar if left out.")
    ] = None,
    levels: Annotated[
        int | None, typer.Option(min=1, help="With --reparametrize-lora: number of levels; 1 if left out.")
    ] = None,
) -> None:
    """Run a program that can load WaRA adapters and compressed models, though nothing in it imports wara_peft."""
    chosen = {"wavelet": wavelet, "levels": levels}
    settings = {name: value for name, value in chosen.items() if value is not None}
    if settings and not reparametrize_lora:
        raise typer.BadParameter("it needs --reparametrize-lora.", param_hint=f"'--{next(iter(settings))}'")
    if wavelet is not None:
        check_wavelet(wavelet)
    with failures_in_a_line(debug=False):
        words = command(program, arguments or [], module)
        execute(words, environment(os.environ, settings if reparametrize_lora else None))


def execute(words: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by the program, so that exit code, signals and tracebacks are the program's own.

    Raises:
        OSError: the system cannot start the program.
    """
    # Python ignores these signals, and a program inherits which signals are ignored. A program that is not Python
    # expects that a closed pipe ends it.
    for name in ("SIGPIPE", "SIGXFSZ"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execve(words[0], words, environment)
    except OSError as error:
        raise OSError(_why_it_cannot_start(words[0], error)) from error


def command(program: str, arguments: Sequence[str], is_module: bool) -> list[str]:
    """The command line to execute: this Python with a script or module, or another program as it is.

    These count as Python scripts: a file with an ending in `PYTHON_ENDINGS`, a folder or zip file with `__main__.py`,
    and a file that has no ending and may not be executed. A bare name without such an ending is looked up first beside
    this Python, then on the PATH, and only then in the working directory.

    Raises:
        FileNotFoundError: there is neither a script nor a command of this name, or a folder has no `__main__.py`.
        PermissionError: the file is not a Python program, and may not be executed.
    """
    if is_module:
        return [sys.executable, "-m", program, *arguments]
    path = Path(program)
    if os.path.basename(program) == program and not (path.is_file() and program.endswith(PYTHON_ENDINGS)):
        # Programs of this Python's environment, such as accelerate, are found even if it is not activated.
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        found = shutil.which(program, path=places)
        if found is not None:
            return [found, *arguments]
        if not path.exists():
            raise FileNotFoundError(f"There is no script {program!r}, and no command of that name. A module needs -m.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {program!r}.")
    if path.is_dir() and not (path / "__main__.py").is_file():
        raise FileNotFoundError(f"{program!r} is a folder without a `__main__.py`, which Python could run.")
    if path.is_dir() or program.endswith(PYTHON_ENDINGS):
        return [sys.executable, program, *arguments]
    if os.access(path, os.X_OK):
        return [program, *arguments]
    if zipfile.is_zipfile(path) or not (path.suffix or _begins_as_another_program(path)):
        return [sys.executable, program, *arguments]
    raise PermissionError(
        f"{program!r} is no Python program, and may not be executed. Allow it (chmod +x {program}), or name the "
        "program that runs it, as in `wara-peft run sh FILE`."
    )


def environment(before: Mapping[str, str], reparametrize_lora: Mapping[str, object] | None = None) -> dict[str, str]:
    """An environment in which every Python imports `wara_peft` right after `peft`, or for a compressed model.

    Programs hand their environment on, so this holds for all processes below the first one.

    Args:
        before: the environment of this process.
        reparametrize_lora: arguments of the function of this name, for every LoRA that trains; None leaves LoRA plain.
    """
    wanted = {} if reparametrize_lora is None else {REPARAMETRIZE: json.dumps(reparametrize_lora)}
    others = [path for path in before.get("PYTHONPATH", "").split(os.pathsep) if path and path != STARTUP]
    kept = {name: value for name, value in before.items() if name != REPARAMETRIZE}
    return {**kept, **wanted, "PYTHONPATH": os.pathsep.join([STARTUP, *others])}


def _begins_as_another_program(path: Path) -> bool:
    """Whether the first line names an interpreter that is not Python, or the file is a binary."""
    with path.open("rb") as file:
        line = file.readline(1000)
    return b"\0" in line or (line.startswith(b"#!") and b"python" not in line)


def _why_it_cannot_start(program: str, error: OSError) -> str:
    """Say what the system's error means for a program that `command` has found."""
    if error.errno == errno.ENOEXEC:
        reason = "it is neither a binary of this system, nor does its first line name an interpreter (#!/bin/sh)"
    elif error.errno == errno.ENOENT:  # `command` has found the program, so something else is missing
        reason = "the interpreter that its first line names is missing"
    else:
        reason = str(error.strerror)
    return f"{program!r} cannot be started: {reason}."
