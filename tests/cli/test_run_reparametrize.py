"""`wara-peft run --reparametrize-lora`: programs that know LoRA only, and their children, train coefficients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pywt
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from typer import BadParameter
from typer.testing import CliRunner

from tests.cli.test_imports import EACH, python
from tests.cli.test_running import run
from tests.test_workflows import language_model  # noqa: F401  # a fixture
from tests.training_run import base_model, logits
from wara_peft.lora.automatic import VARIABLE
from wara_peft.lora.coefficients_file import FILE
from wara_peft.wavelet import filters
from wara_peft_cli.app import app
from wara_peft_cli.options import check_wavelet
from wara_peft_cli.run import REPARAMETRIZE, STARTUP, environment

LORA = "adapter_model.safetensors"

# Trains a LoRA with Trainer, here or in a child process, and writes the logits and the losses.
TRAINS = """
import sys

def train(base, out, steps):  # imports here, which the parent of a child process does not need
    import json
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=6, lora_dropout=0.1, target_modules=["query", "dense"]))
    tokens = torch.randint(1, 50, (48, 6))
    arguments = TrainingArguments(
        out, max_steps=int(steps), save_steps=2, logging_steps=1, learning_rate=1e-2, lr_scheduler_type="constant",
        per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row[0] % 3} for row in tokens])
    trainer.train(resume_from_checkpoint=int(steps) > 2)
    trainer.save_model(out)
    with torch.no_grad():
        torch.save(model.eval()(input_ids=torch.arange(1, 25).view(4, 6)).logits, f"{out}/logits.pt")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    with open(f"{out}/losses.json", "w") as file:
        json.dump(losses, file)

if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    if kind == "here":
        train(*words)
    elif kind == "spawn":
        import multiprocessing
        process = multiprocessing.get_context("spawn").Process(target=train, args=words)
        process.start()
        process.join()
        sys.exit(process.exitcode)
    elif kind == "child":
        import subprocess
        sys.exit(subprocess.run([sys.executable, __file__, "here", *words]).returncode)
"""


def said(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("wara-peft:")]


def numbers(file: Path) -> int:
    """How many numbers of LoRA, or of coefficients, a file has."""
    return sum(tensor.numel() for key, tensor in load_file(file).items() if "lora_" in key)


@pytest.mark.slow
def test_a_program_that_knows_lora_only_trains_and_resumes_in_child_processes_too(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    (tmp_path / "trains.py").write_text(TRAINS)
    option = ["--reparametrize-lora", "--wavelet", "db2"]
    for out, kind, steps in (("whole", "here", 2), ("parts", "child", 2), ("whole", "spawn", 4)):
        result = run(*option, tmp_path / "trains.py", kind, tmp_path / "base", tmp_path / out, steps)
        assert result.returncode == 0, result.stderr
        before, after = numbers(tmp_path / out / LORA), numbers(tmp_path / out / FILE)
        assert 0.49 * before < after < 0.51 * before
        assert said(result.stderr) == [
            f"wara-peft: LoRA 'default': 9 modules train in the wavelet domain: {after:,} parameters in place of "
            f"{before:,} ({after / before:.0%})."
        ]
    # The processes did the same to the bit, each as far as it went.
    losses = {name: json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "parts")}
    assert len(losses["whole"]) == 4 and losses["parts"] == losses["whole"][:2]
    first = tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2"
    assert all((path / FILE).read_bytes() == (first[0] / FILE).read_bytes() for path in first)
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "whole")
    expected = torch.load(tmp_path / "whole" / "logits.pt")
    torch.testing.assert_close(logits(plain), expected, atol=1e-6, rtol=1e-6)
    assert (logits(base_model()) - expected).abs().max() > 1e-3


@pytest.mark.slow
def test_trl_sft(language_model, tmp_path):  # noqa: F811
    texts = ["the cat sat on the mat", "the dog ran on the grass"] * 16
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["trl", "sft", "--use_peft", "--model_name_or_path", language_model, "--dataset_name", tmp_path / "data"]
    words += ["--output_dir", tmp_path / "out", "--max_steps", "6", "--save_steps", "3", "--learning_rate", "3e-2"]
    words += ["--lora_r", "8", "--lora_target_modules", "all-linear", "--report_to", "none", "--use_cpu", "true"]
    words += [
        "--bf16",
        "false",
        "--logging_steps",
        "1",
        "--per_device_train_batch_size",
        "8",
        "--disable_tqdm",
        "true",
    ]
    result = run("--reparametrize-lora", "--levels", "2", *words)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    before, after = numbers(out / LORA), numbers(out / FILE)
    assert len(said(result.stderr)) == 1
    assert f"14 modules train in the wavelet domain: {after:,} parameters in place of {before:,}" in result.stderr
    losses = [
        entry["loss"]
        for entry in json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    loaded = AutoPeftModelForCausalLM.from_pretrained(out)
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert any(tensor.any() for key, tensor in load_file(out / LORA).items() if "lora_B" in key)


@pytest.mark.parametrize("words", [["--wavelet", "db2"], ["--levels", "2"], ["--wavelet", "db2", "--levels", "2"]])
def test_settings_need_the_option(words):
    result = CliRunner().invoke(app, ["run", *words, "program.py"])
    assert result.exit_code == 2
    assert f"'{words[0]}': it needs --reparametrize-lora." in result.output


def test_bad_settings_are_refused_before_the_program_starts(tmp_path):
    """And without PyTorch."""
    (tmp_path / "program.py").write_text("")
    cases = [
        (["--levels", "0"], 2),
        (["--wavelet", "no-wavelet"], 2),
        (["--wavelet", "bior2.2"], 2),
        (["--wavelet", "sym4", "--levels", "2"], "executed"),
    ]
    commands = [["run", "--reparametrize-lora", *words, "program.py"] for words, _ in cases]
    result = python(EACH, json.dumps(commands), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert [code for code, _ in found] == [code for _, code in cases]
    assert all(set(imported) <= {"numpy"} for _, imported in found)
    assert "'no-wavelet' is not a wavelet that PyWavelets knows" in result.stderr
    assert "'bior2.2' is not orthogonal" in result.stderr


@pytest.mark.parametrize("wavelet", [*pywt.wavelist(), "", "Haar", "no-wavelet"])
def test_it_takes_the_wavelets_that_the_library_takes(wavelet):
    try:
        filters(wavelet)
    except ValueError:
        with pytest.raises(BadParameter):
            check_wavelet(wavelet)
    else:
        assert check_wavelet(wavelet) == wavelet


def test_the_environment():
    assert REPARAMETRIZE == VARIABLE
    assert environment({}, {}) == {"PYTHONPATH": STARTUP, VARIABLE: "{}"}
    made = environment({"A": "b", VARIABLE: "{}"}, {"wavelet": "db2", "levels": 2})
    assert json.loads(made[VARIABLE]) == {"wavelet": "db2", "levels": 2} and made["A"] == "b"
    # A run inside of another one decides for itself.
    assert VARIABLE not in environment(made)
