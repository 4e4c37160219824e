"""Checkpoints with an exact LoRA in them, which programs load that cannot import the package."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tests.forked_python import run_python
from tests.training_run import base_model, data, logits
from wara_peft import SaveAsLora, WaRAConfig, to_lora

pytestmark = pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA:UserWarning")

LOADS_WITHOUT_THE_PLUGIN = """
import sys
sys.modules["wara_peft"] = None  # any import of it fails
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification
base, adapter, tokens, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(tokens)).logits, out)
"""


run = partial(run_python, "-m", "tests.training_run")


def adapted(**adapters: WaRAConfig) -> PeftModel:
    (first, config), *others = adapters.items()
    model = get_peft_model(base_model(), config, adapter_name=first)
    for name, other in others:
        model.add_adapter(name, other)
    return model


def config(**fields) -> WaRAConfig:
    return WaRAConfig(**{"target_modules": ["query", "value"], "wara_alpha": 64, "task_type": "SEQ_CLS"} | fields)


def train(model: torch.nn.Module, directory: Path, resume: bool = False, metrics=None, **fields) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": 6, "save_steps": 2} | fields,
    )
    datasets = {"train_dataset": data(), "eval_dataset": data()[:8]}
    trainer = Trainer(model, arguments, **datasets, callbacks=[SaveAsLora()], compute_metrics=metrics)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def loras(directory: Path) -> list[str]:
    """Directories below this one with a LoRA in them."""
    configs = sorted(directory.rglob("adapter_config.json"))
    found = [path.parent for path in configs if json.loads(path.read_text())["peft_type"] == "LORA"]
    assert all((path / "adapter_model.safetensors").is_file() for path in found)
    return [str(path.relative_to(directory)) for path in found]


def same_as_the_adapter(checkpoint: Path, name: str = "default", adapter: Path | None = None) -> None:
    """The LoRA of that name is, to the bit, that of the WaRA adapter in the checkpoint."""
    wara = PeftModel.from_pretrained(base_model(), adapter or checkpoint)
    expected = to_lora(wara)[1]
    found = load_file(checkpoint / "as_lora" / name / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    lora = PeftModel.from_pretrained(base_model(), checkpoint / "as_lora" / name)
    torch.testing.assert_close(logits(lora), logits(wara), atol=1e-5, rtol=1e-5)
    assert (logits(lora) - logits(base_model())).abs().max() > 1e-3


@pytest.mark.slow
def test_a_program_without_the_plugin_loads_every_checkpoint(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    train(adapted(default=config()), tmp_path / "out", max_steps=4)
    assert loras(tmp_path / "out") == ["checkpoint-2/as_lora/default", "checkpoint-4/as_lora/default"]
    torch.save(torch.arange(1, 25).view(4, 6), tmp_path / "tokens.pt")
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        same_as_the_adapter(tmp_path / "out" / checkpoint)
        adapter = tmp_path / "out" / checkpoint / "as_lora" / "default"
        arguments = [tmp_path / "base", adapter, tmp_path / "tokens.pt", tmp_path / "logits.pt"]
        result = run_python("-c", LOADS_WITHOUT_THE_PLUGIN, *arguments)
        assert result.returncode == 0, result.stderr
        wara = PeftModel.from_pretrained(base_model(), tmp_path / "out" / checkpoint)
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(wara), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [("--kill-at-step", "6"), ("--kill-after-save", "8")])
def test_killed_and_resumed(tmp_path, kill):
    whole = run(tmp_path / "whole", "--as-lora")
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", "--as-lora", *kill)
    assert killed.returncode == -signal.SIGKILL
    kept = tmp_path / "killed" / "checkpoints"
    last = {"6": "checkpoint-4", "8": "checkpoint-8"}[kill[1]]
    assert loras(kept) == ["checkpoint-4/as_lora/default"]  # the second is killed before that of step 8 is written
    assert max(path.name for path in kept.iterdir()) == last

    resumed = run(tmp_path / "killed", "--as-lora", "--resume")

    assert resumed.returncode == 0, resumed.stderr
    files = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "killed")]
    assert files[0] == files[1]
    for name in ("whole", "killed"):
        assert "checkpoint-12/as_lora/default" in loras(tmp_path / name / "checkpoints")
    tensors = [
        load_file(tmp_path / name / "checkpoints/checkpoint-12/as_lora/default/adapter_model.safetensors")
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(tensors[1][key], value) for key, value in tensors[0].items())


@pytest.mark.slow
def test_of_two_processes_one_writes(tmp_path):
    result = run(tmp_path, "--as-lora", processes=2)
    assert result.returncode == 0, result.stderr
    assert loras(tmp_path / "checkpoints")[-1] == "checkpoint-6/as_lora/default"
    same_as_the_adapter(tmp_path / "checkpoints" / "checkpoint-6")
    assert "is being written by another process" not in result.stderr


def test_the_best_model_is_loaded_and_old_checkpoints_go_with_their_loras(tmp_path):
    model = adapted(default=config())
    scores = iter([1.0, 3.0, 2.0, 0.0])  # so that the best is neither the first nor the last
    trainer = train(
        model,
        tmp_path,
        metrics=lambda _: {"score": next(scores)},
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        max_steps=8,
        metric_for_best_model="score",
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-4"
    assert loras(tmp_path) == ["checkpoint-4/as_lora/default", "checkpoint-8/as_lora/default"]
    same_as_the_adapter(best)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base_model(), best)))
    assert list(model.peft_config) == ["default"]


WITH_DEFAULT = pytest.param(
    "default",
    marks=pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"), reason="Trainer resumes the others alone before 5.23"
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("first", [WITH_DEFAULT, "main"])
def test_named_adapters_resume_as_they_were(tmp_path, first):
    """Trainer takes folders of a checkpoint with an adapter's file for adapters, and those of LoRAs are none."""
    adapters = {first: config(), "other": config(r=2, init_weights=False, wavelet="db2")}
    model = adapted(**adapters)
    train(model, tmp_path, max_steps=4)
    assert loras(tmp_path / "checkpoint-4") == sorted([f"as_lora/{first}", "as_lora/other"])
    main = tmp_path / "checkpoint-4" if first == "default" else tmp_path / "checkpoint-4" / "main"
    same_as_the_adapter(tmp_path / "checkpoint-4", first, main)
    same_as_the_adapter(tmp_path / "checkpoint-4", "other", tmp_path / "checkpoint-4" / "other")

    expected = {name: to_lora(model, adapter_name=name)[1] for name in adapters}
    resumed = adapted(**adapters)
    train(resumed, tmp_path, resume=True, max_steps=4)  # nothing is left to train
    assert list(resumed.peft_config) == list(adapters)
    for name, tensors in expected.items():
        found = to_lora(resumed, adapter_name=name)[1]
        assert all(torch.equal(found[key], value) for key, value in tensors.items()), name


def test_an_adapter_added_by_transformers(tmp_path):
    model = base_model()
    model.add_adapter(config(init_weights=False))
    train(model, tmp_path, max_steps=2)
    assert loras(tmp_path) == ["checkpoint-2/as_lora/default"]
    expected = to_lora(model)[1]
    found = load_file(tmp_path / "checkpoint-2" / "as_lora" / "default" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_it_refuses_before_training(tmp_path):
    with pytest.raises(ValueError, match="found no WaRA adapter in the model"):
        train(base_model(), tmp_path)
    model = adapted(default=config())
    model.peft_config["default"].form = "grid"
    with pytest.raises(ValueError, match="Adapter 'default' has form='grid', which is no LoRA"):
        train(model, tmp_path)
    assert list(tmp_path.rglob("adapter_model.safetensors")) == []
    trainer = Trainer(adapted(default=config()), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    trainer.state.is_hyper_param_search = True
    with pytest.raises(ValueError, match="not for hyper-parameter search"):
        SaveAsLora().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_checkpoint_without_an_adapter_is_said(tmp_path):
    trainer = Trainer(adapted(default=config()), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    with pytest.warns(UserWarning, match=r"checkpoint-0' holds no WaRA adapter in one piece"):
        SaveAsLora().on_save(trainer.args, trainer.state, trainer.control)


def test_a_process_that_does_not_save_writes_nothing(tmp_path):
    model = adapted(default=config(init_weights=False))
    model.save_pretrained(tmp_path / "checkpoint-0")
    for saves, expected in ((False, []), (True, ["checkpoint-0/as_lora/default"])):
        arguments = SimpleNamespace(should_save=saves, output_dir=str(tmp_path))
        SaveAsLora().on_save(arguments, TrainerState(), TrainerControl())
        assert loras(tmp_path) == expected
