"""`wara-peft run`: programs that never import the package load WaRA adapters, and so do all processes below them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.training_run import base_model, logits
from wara_peft import WaRAConfig
from wara_peft.running import STARTUP, command, environment

COMMAND = Path(sys.executable).parent / "wara-peft"
ROOT = Path(__file__).parents[1]

# Loads the adapter of its first argument through plain PEFT, and writes the logits.
LOADER = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

def write_logits(base, adapter, out):
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(1, 25).view(4, 6)).logits, out)

if __name__ == "__main__":
    base, adapter, out, kind = sys.argv[1:]
    if kind == "here":
        write_logits(base, adapter, out)
    elif kind == "spawn":
        import multiprocessing
        process = multiprocessing.get_context("spawn").Process(target=write_logits, args=(base, adapter, out))
        process.start()
        process.join()
        sys.exit(process.exitcode)
    elif kind == "child":
        import subprocess
        sys.exit(subprocess.run([sys.executable, __file__, base, adapter, out, "here"]).returncode)
    elif kind == "accelerate":
        from accelerate import PartialState
        state = PartialState(cpu=True)
        assert state.num_processes == 2, state
        write_logits(base, adapter, f"{out}.{state.process_index}")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made")
    base_model().save_pretrained(path / "base")
    base = type(base_model()).from_pretrained(path / "base")
    model = get_peft_model(base, WaRAConfig(target_modules="all-linear", init_weights=False, task_type="SEQ_CLS"))
    model.save_pretrained(path / "adapter")
    torch.save(logits(model), path / "expected.pt")
    (path / "loader.py").write_text(LOADER)
    return path


def run(*words: object, python_path: str = str(ROOT), **options) -> subprocess.CompletedProcess[str]:
    before = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    return subprocess.run(
        [COMMAND, "run", *map(str, words)], env=before, capture_output=True, text=True, timeout=300, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["here", "child", "spawn"])
def test_a_script_and_its_children_load_the_adapter(made, tmp_path, kind):
    result = run(made / "loader.py", made / "base", made / "adapter", tmp_path / "logits.pt", kind)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), torch.load(made / "expected.pt"))


@pytest.mark.slow
def test_accelerate_launch(made, tmp_path):
    launch = ["accelerate", "launch", "--config_file", ROOT / "examples" / "distributed" / "ddp.yaml"]
    launch += ["--mixed_precision", "no"]
    result = run(*launch, made / "loader.py", made / "base", made / "adapter", tmp_path / "logits.pt", "accelerate")
    assert result.returncode == 0, result.stderr
    for process in range(2):
        assert torch.equal(torch.load(f"{tmp_path / 'logits.pt'}.{process}"), torch.load(made / "expected.pt"))


@pytest.mark.slow
def test_without_it_peft_does_not_know_the_adapter(made, tmp_path):
    """What the others would see if nothing were done."""
    words = [made / "loader.py", made / "base", made / "adapter", tmp_path / "logits.pt", "here"]
    result = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "WARA" in result.stderr


SAYS = """
import json, os, sys
said = {"argv": sys.argv, "name": __name__, "path": sys.path[0], "plugin": "wara_peft" in sys.modules}
said["torch"] = "torch" in sys.modules
import sitecustomize
said["hidden"] = getattr(sitecustomize, "SEEN", None)
print(json.dumps(said))
"""


def last_line(result: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_the_program_sees_of_it(tmp_path):
    """Its own arguments, also those that look like ours; a user's own sitecustomize; no import it did not ask for."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("SEEN = 'the one of before'")
    (tmp_path / "says.py").write_text(SAYS)
    arguments = ["--help", "-m", "--", "--debug", "x y", ""]
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])

    said = last_line(run(tmp_path / "says.py", *arguments, python_path=path))
    assert said["argv"] == [str(tmp_path / "says.py"), *arguments]
    assert said["name"] == "__main__" and said["path"] == str(tmp_path)
    assert said["hidden"] == "the one of before"
    assert not said["plugin"] and not said["torch"]

    as_module = last_line(run("-m", "says", *arguments, python_path=path, cwd=tmp_path))
    assert as_module["argv"] == [str(tmp_path / "says.py"), *arguments] and as_module["name"] == "__main__"


@pytest.mark.slow
def test_exit_codes_signals_and_tracebacks_are_the_programs_own(tmp_path):
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(7)")
    assert run(tmp_path / "exits.py").returncode == 7

    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    assert run(tmp_path / "killed.py").returncode == -signal.SIGTERM

    (tmp_path / "fails.py").write_text("def inner():\n    raise KeyError('mine')\ninner()")
    result = run(tmp_path / "fails.py")
    assert result.returncode == 1
    trace = result.stderr[result.stderr.index("Traceback") :]
    expected = subprocess.run([sys.executable, tmp_path / "fails.py"], capture_output=True, text=True).stderr
    assert trace == expected

    result = run("no-such-program")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "There is no script 'no-such-program', and no command of that name. A module needs -m." in result.stderr


@pytest.mark.slow
def test_asking_whether_peft_is_there_and_a_python_without_the_plugin(tmp_path):
    (tmp_path / "asks.py").write_text(
        "import importlib.util, sys\n"
        "assert importlib.util.find_spec('peft') and 'peft' not in sys.modules\n"
        "import peft\n"
        "assert 'wara_peft' in sys.modules and peft.PeftType.WARA"
    )
    result = run(tmp_path / "asks.py")
    assert result.returncode == 0, result.stderr

    (tmp_path / "lacks.py").write_text(
        "import sys\nsys.modules['wara_peft'] = None\nimport peft\nprint(peft.PeftModel)"
    )
    result = run(tmp_path / "lacks.py")
    assert result.returncode == 0, result.stderr
    assert "has no wara_peft, so PEFT will not load WaRA adapters in this process" in result.stderr


def test_the_command_and_its_environment(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("")
    assert command(str(script), ["a"], False) == [sys.executable, str(script), "a"]
    assert command("package.module", ["-x"], True) == [sys.executable, "-m", "package.module", "-x"]
    assert command("accelerate", [], False) == [str(Path(sys.executable).parent / "accelerate")]
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    (tmp_path / "tool").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("tool", [], False) == [str(tmp_path / "tool")]
    assert environment({"A": "b"}) == {"A": "b", "PYTHONPATH": STARTUP}
    once = environment({"PYTHONPATH": os.pathsep.join(["one", "", "two"])})
    assert once["PYTHONPATH"].split(os.pathsep) == [STARTUP, "one", "two"]
    assert environment(once) == once
    assert {path.name for path in Path(STARTUP).glob("*.py")} == {"__init__.py", "sitecustomize.py"}


def test_the_adapter_of_these_tests_matters(made):
    loaded = PeftModel.from_pretrained(base_model(), made / "adapter")
    assert torch.equal(logits(loaded), torch.load(made / "expected.pt"))
    assert (logits(base_model()) - torch.load(made / "expected.pt")).abs().max() > 1e-3
