"""Python programs in forks of a process that has imported the libraries, which take eight seconds to import.

The package itself is not imported there, so that a program finds it, or does not, as a fresh interpreter would.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "accelerate",
        "bitsandbytes",
        "datasets",
        "diffusers",
        "matplotlib.pyplot",
        "peft",
        "scipy.optimize",
        "sklearn.datasets",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "transformers.trainer",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
        "transformers.models.vit.modeling_vit",
        "tests.docstrings_in_advance",
    ]
)


def run_python(
    *arguments: object,
    processes: int = 1,
    cwd: str | Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 1800,
) -> subprocess.CompletedProcess[str]:
    """Do what `python ARGUMENTS` does, of `-c CODE`, `-m MODULE` or `SCRIPT` with arguments of its own.

    Args:
        arguments: the arguments of the interpreter.
        processes: how many processes do this; several have the variables that `torch.distributed.run` sets.
        cwd: the folder in which they start.
        env: variables that are added to this process's own.
        timeout: seconds after which a program that hangs is killed; a busy machine needs many times a quiet one's.

    Returns:
        The first exit code other than 0 (negative for a signal), and all that the processes wrote.
    """
    words = [str(argument) for argument in arguments]
    store = TCPStore("127.0.0.1", 0, wait_for_workers=False, is_master=True) if processes > 1 else None
    with TemporaryDirectory() as folder:
        started: list[BaseProcess] = []
        # A child of multiprocessing imports its parent's main module, which is pytest or what called it.
        with patch.dict(sys.modules, __main__=ModuleType("__main__")):
            for rank in range(processes):
                environment = {**os.environ, **(env or {})}
                if store is not None:
                    environment |= variables_of_rank(rank, processes, store.port)
                process = FORKS.Process(target=be_python, args=(words, str(cwd), environment, f"{folder}/{rank}"))
                process.start()
                started.append(process)
        end_together(started, timeout)
        stdout, stderr = (
            "".join(Path(f"{folder}/{rank}.{stream}").read_text() for rank in range(processes))
            for stream in ("stdout", "stderr")
        )
    code = next((process.exitcode for process in started if process.exitcode), 0)
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def variables_of_rank(rank: int, processes: int, port: int) -> dict[str, str]:
    """What `torch.distributed.run` sets for a process; the store at that port is this process's own."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in (numbers | store).items()}


def end_together(started: list[BaseProcess], timeout: float) -> None:
    """Wait for all processes; if one fails or time is up, kill the others, which would wait for it."""
    deadline = time.monotonic() + timeout
    running = list(started)
    while running and not any(process.exitcode for process in started):
        if not wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic())):
            break
        running = [process for process in running if process.exitcode is None]
    for process in running:
        process.kill()
    for process in started:
        process.join()


def be_python(words: list[str], folder: str, environment: Mapping[str, str], output: str) -> None:
    """Run in the child: become the interpreter that has these arguments, this folder and this environment."""
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *others = words
    sys.path.insert(0, "" if first in ("-c", "-m") else str(Path(first).parent))
    if first == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")
