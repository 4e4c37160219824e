"""`wara-peft run`: programs that never import the package load WaRA adapters, and so do all processes below them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.forked_python import run_python
from tests.training_run import base_model, logits
from wara_peft import WaRAConfig
from wara_peft.compression import factorize
from wara_peft_cli.run import STARTUP, command, environment

COMMAND = Path(sys.executable).parent / "wara-peft"
ROOT = Path(__file__).parents[2]

# Loads the adapter of its second argument through plain PEFT, and writes the logits.
LOADER = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base, adapter, out, kind = sys.argv[1:]
if kind == "accelerate":
    from accelerate import PartialState
    state = PartialState(cpu=True)
    assert state.num_processes == 2, state
    out = f"{out}.{state.process_index}"
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 25).view(4, 6)).logits, out)
"""

# Ends with status 7 if `wara_peft` is imported right after `peft`, in the process that its argument asks for.
ASKS = """
import multiprocessing, subprocess, sys

def ask():
    import peft
    sys.exit(7 if "wara_peft" in sys.modules else 1)

if __name__ == "__main__":
    kind = sys.argv[1]
    assert "wara_peft" not in sys.modules
    if kind == "here":
        ask()
    if kind == "child":
        sys.exit(subprocess.run([sys.executable, __file__, "here"]).returncode)
    process = multiprocessing.get_context(kind).Process(target=ask)
    process.start()
    process.join()
    sys.exit(process.exitcode)
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
    before = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path}
    return subprocess.run(
        [COMMAND, "run", *map(str, words)], env=before, capture_output=True, text=True, timeout=1800, **options
    )


@pytest.fixture
def empty_libraries(tmp_path) -> str:
    """A path on which `peft` and `wara_peft` are empty: they import at once, and who imports them is seen as well."""
    for name in ("peft", "wara_peft"):
        (tmp_path / "libraries" / name).mkdir(parents=True)
        (tmp_path / "libraries" / name / "__init__.py").touch()
    return os.pathsep.join([str(tmp_path / "libraries"), str(ROOT)])


@pytest.mark.slow
def test_a_script_loads_the_adapter(made, tmp_path):
    result = run(made / "loader.py", made / "base", made / "adapter", tmp_path / "logits.pt", "here")
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), torch.load(made / "expected.pt"))


# Loads a compressed model through transformers, which does not import PEFT, and writes the logits.
COMPRESSED = """
import sys
import torch
from transformers import AutoModelForSequenceClassification, pipeline
assert "peft" not in sys.modules and "wara_peft" not in sys.modules
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 25).view(4, 6)).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_script_loads_a_compressed_model(tmp_path):
    model = base_model()
    factorize(model, 0.5)
    model.save_pretrained(tmp_path / "compressed")
    program = written(tmp_path / "program.py", COMPRESSED)
    words = (program, tmp_path / "compressed", tmp_path / "logits.pt")
    assert run_python(*words).returncode != 0 and not (tmp_path / "logits.pt").exists()
    result = run(*words)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["here", "child", "spawn", "fork", "forkserver"])
def test_a_script_and_its_children_import_the_plugin(empty_libraries, tmp_path, kind):
    program = written(tmp_path / "asks.py", ASKS)
    result = run(program, kind, python_path=empty_libraries)
    assert result.returncode == 7, result.stderr
    alone = subprocess.run([sys.executable, program, kind], env=os.environ | {"PYTHONPATH": empty_libraries})
    assert alone.returncode == 1


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
    result = run_python(*words)
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
def test_asking_whether_peft_is_there_and_a_python_without_the_plugin(empty_libraries, tmp_path):
    (tmp_path / "asks.py").write_text(
        "import importlib.util, sys\n"
        "assert importlib.util.find_spec('peft') and 'peft' not in sys.modules\n"
        "import peft\n"
        "assert 'wara_peft' in sys.modules"
    )
    result = run(tmp_path / "asks.py", python_path=empty_libraries)
    assert result.returncode == 0, result.stderr

    (tmp_path / "lacks.py").write_text("import sys\nsys.modules['wara_peft'] = None\nimport peft\nprint(peft)")
    result = run(tmp_path / "lacks.py", python_path=empty_libraries)
    assert result.returncode == 0, result.stderr
    assert "has no wara_peft, so PEFT will not load WaRA adapters in this process" in result.stderr


def test_the_command_and_its_environment(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("")
    assert command(str(script), ["a"], False) == [sys.executable, str(script), "a"]
    assert command("package.module", ["-x"], True) == [sys.executable, "-m", "package.module", "-x"]
    assert command(sys.executable, ["-c", "1"], False) == [sys.executable, "-c", "1"]  # a path to an interpreter
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


def written(path: Path, text: str, mode: int = 0o644) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_python_gets_only_what_is_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    python = [sys.executable]
    written(Path("run.sh"), "#!/bin/sh\n", 0o755)
    assert command("./run.sh", ["a"], False) == ["./run.sh", "a"]
    assert command("run.sh", ["a"], False) == ["run.sh", "a"]
    written(Path("tool"), "#!/other/bin/python3\n", 0o755)  # its own interpreter knows its packages
    assert command("./tool", [], False) == ["./tool"]
    written(Path("script.py"), "#!/usr/bin/python3\n", 0o755)
    assert command("./script.py", [], False) == [*python, "./script.py"]
    written(Path("train"), "import sys\n")
    assert command("train", [], False) == [*python, "train"]
    written(Path("marked"), "#!/usr/bin/env python3\n")
    assert command("./marked", [], False) == [*python, "./marked"]
    with zipfile.ZipFile("program", "w") as file:
        file.writestr("__main__.py", "")
    assert command("./program", [], False) == [*python, "./program"]
    Path("folder").mkdir()
    written(Path("folder", "__main__.py"), "")
    assert command("./folder", [], False) == [*python, "./folder"]
    # A clone of a program's repository has a folder of its name, and the command is meant.
    Path("sh").mkdir()
    written(Path("sh", "__main__.py"), "")
    assert command("sh", ["-c", "true"], False)[0] in ("/bin/sh", "/usr/bin/sh")
    assert command("./sh", [], False) == [*python, "./sh"]


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("#!/bin/sh\n", "run.sh", "'./run.sh' is no Python program, and may not be executed. Allow it (chmod +x"),
        ("#!/bin/sh\n", "run", "'./run' is no Python program, and may not be executed"),
        ("\0ELF", "binary", "'./binary' is no Python program, and may not be executed"),
        ("text", "notes.txt", "'./notes.txt' is no Python program, and may not be executed"),
        (None, "missing.sh", "There is no file './missing.sh'."),
        (None, "folder/", "'./folder/' is a folder without a `__main__.py`"),
    ],
)
def test_files_that_cannot_run(tmp_path, monkeypatch, text, name, said):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        written(Path(name), text)
    elif name.endswith("/"):
        Path(name).mkdir()
    with pytest.raises((FileNotFoundError, PermissionError), match=re.escape(said)):
        command(f"./{name}", [], False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo\n", "its first line name an interpreter (#!/bin/sh)"),
        ("#!/no/such/interpreter\n", "the interpreter that its first line names is missing"),
    ],
)
def test_files_that_the_system_cannot_start(tmp_path, text, said):
    file = written(tmp_path / "file", text, 0o755)
    result = run(file)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"wara-peft: {str(file)!r} cannot be started: ") and said in line


@pytest.mark.slow
def test_other_programs_run_as_they_are(empty_libraries, tmp_path):
    """A shell script, whose exit code and signals are its own, and in which Python children import the plugin."""
    child = written(tmp_path / "child.py", "import sys, peft\nsys.exit(7 if 'wara_peft' in sys.modules else 1)")
    script = written(tmp_path / "run.sh", '#!/bin/sh\nshift\n"$@"\nexit $?\n', 0o755)
    for words in ([script, "first", sys.executable, child], [sys.executable, child]):
        assert run(*words, python_path=empty_libraries).returncode == 7
    result = run(sys.executable, "-c", child.read_text(), python_path=empty_libraries, cwd=tmp_path)
    assert result.returncode == 7, result.stderr
    killed = written(tmp_path / "killed", "#!/bin/sh\nkill -TERM $$\n", 0o755)
    assert run(killed).returncode == -signal.SIGTERM
    # Python ignores SIGPIPE, and what it executes must not: it would not end when its reader does.
    ignores = written(tmp_path / "ignores", "#!/bin/sh\nkill -PIPE $$\nexit 0\n", 0o755)
    assert run(ignores).returncode == -signal.SIGPIPE


FIRST_IMPORTS = [
    "import peft",
    "import accelerate",
    "import datasets",
    "import diffusers, trl, transformers",
    "import wara_peft",
    "from transformers import Trainer",
    "from transformers import TrainingArguments",
    "from transformers.trainer_utils import set_seed",
    "from diffusers.training_utils import EMAModel",
    "from trl import SFTTrainer",
    "from sentence_transformers import SentenceTransformer",
    "from peft.tuners.lora import LoraLayer",
]
OTHERS = [
    "bitsandbytes",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "scipy.stats",
    "scipy.optimize",
    "sklearn.metrics",
    "pandas",
    "pyarrow.dataset",
    "tokenizers",
    "huggingface_hub.hf_api",
    "fsspec",
    "pywt",
]
"""Modules that these libraries import, that take most of the time, and that import none of these libraries."""
# A process for each of them, begun where none of them is imported.
FIRST = f"""
import importlib, importlib.util, os, sys, torch, traceback
for name in {OTHERS!r}:
    if importlib.util.find_spec(name.split(".")[0]):
        importlib.import_module(name)
def program(first):
    exec(first)
    import peft, pickle, transformers
    from transformers import Trainer
    assert "wara_peft" in sys.modules and "WARA" in peft.PeftType.__members__
    import wara_peft
    for callback in (wara_peft.SaveAsLora, wara_peft.RankSchedule):
        assert issubclass(callback, transformers.TrainerCallback)
        assert pickle.loads(pickle.dumps(callback)) is callback
assert not {{"transformers", "peft", "accelerate", "datasets", "diffusers", "trl", "wara_peft"}} & sys.modules.keys()
for first in {FIRST_IMPORTS!r}:
    if importlib.util.find_spec(first.split()[1].strip(",").split(".")[0]) is None:
        continue
    child = os.fork()
    if not child:
        try:
            program(first)
        except BaseException:
            print(f"after {{first!r}}:", traceback.format_exc(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
print("all ran")
"""


@pytest.mark.slow
def test_whatever_a_program_imports_first(tmp_path):
    """PEFT, and with it this package, may be imported while others are half imported."""
    before = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = command(str(written(tmp_path / "program.py", FIRST)), [], False)
    result = subprocess.run(words, env=environment(before), capture_output=True, text=True, timeout=900)
    assert result.stdout == "all ran\n", result.stdout + result.stderr


@pytest.mark.slow
def test_importing_needs_nothing_that_peft_does_not_need():
    """PEFT is imported while modules of transformers are half loaded, so ours must need none of them."""
    code = """
import sys
LIBRARIES = ("transformers", "accelerate", "diffusers", "datasets", "trl", "sentence_transformers")
def of_libraries():
    return {name for name in sys.modules if name.split(".")[0] in LIBRARIES}
import peft
before = of_libraries()
import wara_peft
assert of_libraries() == before, of_libraries() - before
assert not {name for name in before if "trainer" in name}
assert {"SaveAsLora", "RankSchedule"} <= set(dir(wara_peft)) and of_libraries() == before
from wara_peft import *
assert SaveAsLora is wara_peft.SaveAsLora and "transformers.trainer_callback" in sys.modules
import importlib
importlib.reload(peft)
importlib.reload(wara_peft)
assert SaveAsLora is wara_peft.SaveAsLora and "WARA" in peft.PeftType.__members__
assert not hasattr(wara_peft, "NoSuchName")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_the_adapter_of_these_tests_matters(made):
    loaded = PeftModel.from_pretrained(base_model(), made / "adapter")
    assert torch.equal(logits(loaded), torch.load(made / "expected.pt"))
    assert (logits(base_model()) - torch.load(made / "expected.pt")).abs().max() > 1e-3
