"""The command imports what it needs and no more, and Ctrl-C meanwhile ends it with a line in place of a traceback.

Processes that import neither PyTorch nor PEFT take a fraction of a second, so tests that start them are not `slow`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer import Exit
from typer.main import get_command

from wara_peft_cli.app import app
from wara_peft_cli.terminal import failures_in_a_line

ROOT = Path(__file__).parents[2]
MAIN = "from wara_peft_cli import main; main()"
INTERRUPTED = "wara-peft: interrupted; nothing was written.\n"

# Runs commands one after the other, and says after each its exit status and which libraries are imported.
EACH = """
import json, os, sys
from wara_peft_cli import main
os.execve = lambda *_: sys.exit("executed")
LIBRARIES = {"torch", "transformers", "peft", "numpy", "wara_peft"}
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["wara-peft", *arguments]
    try:
        main()
    except SystemExit as end:
        found.append((end.code, sorted(LIBRARIES & {name.partition(".")[0] for name in sys.modules})))
print(json.dumps(found))
"""


def python(code: str, *arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **options)


def test_help_and_usage_errors_import_no_library(tmp_path):
    """One process runs them all; what one of them imported would show in the later ones too."""
    commands = get_command(app).commands
    assert len(commands) >= 5
    expected = [
        (["--help"], 0),
        (["--version"], 0),
        *(([name, "--help"], 0) for name in commands),
        ([], 2),
        (["frobnicate"], 2),
        (["--frobnicate"], 2),
        *(([name, "--frobnicate"], 2) for name in commands if name != "run"),
        (["export", "a", "--rank", "2"], 2),
        (["export", "a", "b", "--rank", "2", "--energy", "0.5"], 2),
        (["export", "a", "b", "--dtype", "int8"], 2),
        (["export", "a", "b", "--format", "onnx"], 2),
        (["export", "a", "b.gguf", "--format", "gguf"], 2),
        (["export", "a", "b", "--base", "c"], 2),
        (["merge", "a", "b", "--device", "cpu"], 2),
        (["combine", "a", "b", "-w", "1,1"], 2),
        (["combine", "a", "b", "c", "-w", "1"], 2),
        (["combine", "a", "b", "c", "-w", "1,1", "--type", "mean"], 2),
        (["compress", "a", "b", "--device", "cpu"], 2),
        *((["compress", "a", "b", "--budget", "1", f"--{name}", "?"], 2) for name in ("solver", "allocation", "cost")),
        (["inspect"], 2),
        (["inspect", "nowhere"], 1),
        (["run"], 2),
        (["run", "--wavelet", "db2", "nowhere.py"], 2),
        (["run", "--reparametrize-lora", "--levels", "0", "nowhere.py"], 2),
        (["run", "--reparametrize-lora", "nowhere.py"], 1),
        (["run", "nowhere.py"], 1),
        (["run", "-m", "program", "--help"], "executed"),
    ]
    result = python(EACH, json.dumps([arguments for arguments, _ in expected]), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for (arguments, code), row in zip(expected, found, strict=True):
        assert row == [code, []], arguments


MERGE, EXPORT = ["merge", "here", "here", "out"], ["export", "here", "out"]


@pytest.mark.parametrize(
    ("module", "arguments", "raised"),
    [
        ("typer", ["--help"], "KeyboardInterrupt"),
        ("torch", MERGE, "KeyboardInterrupt"),
        ("torch", MERGE, "ImportError"),
        ("wara_peft", EXPORT, "KeyboardInterrupt"),
    ],
)
def test_interrupted_while_it_imports(tmp_path, module, arguments, raised):
    """A module in the place of a library is interrupted while it is imported, and may raise another exception then."""
    (tmp_path / "here").mkdir()
    stub = (
        f"import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    raise {raised}\n"
    )
    (tmp_path / f"{module}.py").write_text(stub)
    result = python(MAIN, *arguments, cwd=tmp_path)
    assert (result.stderr, result.stdout, result.returncode) == (INTERRUPTED, "", 130)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("imported", ["torch", "transformers"])
def test_interrupted_while_it_imports_real_libraries(tmp_path, imported):
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-X", "importtime", "-c", MAIN, *EXPORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if line.rpartition("|")[2].strip().partition(".")[0] == imported)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert [line for line in said.splitlines(True) if not line.startswith("import time:")] == [INTERRUPTED]


def test_the_signal_to_terminate_and_one_that_is_ignored(capsys):
    """An exit status of 1 for SIGTERM; and who starts the command with SIGINT ignored wants it to go on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with failures_in_a_line(debug=False):
            signal.raise_signal(signal.SIGINT)
            reached = True
        assert reached and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, status in ((signal.SIGTERM, 1), (signal.SIGINT, 130)):
        with pytest.raises(Exit) as end, failures_in_a_line(debug=False):
            signal.raise_signal(number)
        assert end.value.exit_code == status
        assert capsys.readouterr().err == INTERRUPTED
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
