"""What `run_python` does is what the interpreter does: arguments, folder, environment, output and exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.forked_python import run_python

pytestmark = pytest.mark.slow

PROGRAM = """
import os, sys
from pathlib import Path
print(__name__, sys.argv[1:], os.getcwd(), os.environ["WARA_TEST"], os.environ["OMP_NUM_THREADS"], flush=True)
print("to stderr", file=sys.stderr)
if sys.argv[1:] == ["dies"]:
    os.kill(os.getpid(), 9)
sys.exit({"stops": "a message", "three": 3, "ends": None}[sys.argv[1]])
"""


@pytest.mark.parametrize("argument", ["ends", "three", "stops", "dies", "unknown"])
@pytest.mark.parametrize("way", ["code", "module", "script"])
def test_it_does_what_the_interpreter_does(tmp_path, way, argument):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = {"code": ["-c", PROGRAM], "module": ["-m", "program"], "script": ["program.py"]}[way]
    env = {"WARA_TEST": "set", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    found = run_python(*words, argument, cwd=tmp_path, env=env)
    expected = subprocess.run(
        [sys.executable, "-S", *words, argument], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert found.returncode == expected.returncode
    assert found.stdout == expected.stdout
    if argument == "unknown":
        assert found.stderr.splitlines()[-1] == expected.stderr.splitlines()[-1] == "KeyError: 'unknown'"
    else:
        assert found.stderr == expected.stderr


def test_the_package_is_not_imported_and_the_libraries_are():
    code = "import sys; print(*[name in sys.modules for name in ('torch', 'peft', 'transformers', 'wara_peft')])"
    assert run_python("-c", code).stdout.split() == ["True", "True", "True", "False"]


def test_several_processes_reduce():
    code = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
number = torch.tensor(10.0 ** dist.get_rank())
dist.all_reduce(number)
print(dist.get_rank(), dist.get_world_size(), number.item())
dist.destroy_process_group()
"""
    assert run_python("-c", code, processes=2).stdout.splitlines() == ["0 2 11.0", "1 2 11.0"]


def test_what_waits_for_a_process_that_failed_is_killed():
    code = """
import torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    raise SystemExit("the second one fails")
dist.barrier()
import time
time.sleep(1000)
"""
    done = run_python("-c", code, processes=2)
    assert done.returncode in (1, -signal.SIGKILL)
    assert "the second one fails" in done.stderr


def test_what_hangs_is_killed():
    done = run_python("-c", "import time; print('begins', flush=True); time.sleep(1000)", timeout=0.5)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "begins\n")
