"""Checkpoints of a reparametrised LoRA are plain LoRA, and resume to the bit with the second file beside them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import warnings
from copy import deepcopy
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from tests.forked_python import run_python
from tests.training_run import TOKENS, base_model, data, logits
from wara_peft import plain_lora, reparametrize_lora
from wara_peft.lora.coefficients_file import FILE

LORA = "adapter_model.safetensors"
run = partial(run_python, "-m", "tests.training_run")


def lora(r: int = 6, **fields) -> LoraConfig:
    return LoraConfig(**{"r": r, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"} | fields)


def adapted(trained: bool = True, **adapters: LoraConfig) -> PeftModel:
    """A model with reparametrised LoRAs, whose coefficients are as after some training."""
    (first, config), *others = (adapters or {"default": lora()}).items()
    model = get_peft_model(base_model(), config, adapter_name=first)
    for name, other in others:
        model.add_adapter(name, other)
    for name in model.peft_config:
        reparametrize_lora(model, name, wavelet="db2")
    if trained:
        move(model)
    return model


def move(model: nn.Module) -> None:
    """Change what trains, as an optimizer does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def coefficients(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if f".{adapter}.factor." in name
    }


def loaded_as_plain(directory: Path, kind: str = "PeftModel") -> nn.Module:
    """A model that never was reparametrised, with the LoRA that is saved there."""
    if kind == "PeftModel":
        return PeftModel.from_pretrained(base_model(), directory)
    model = base_model()
    model.load_adapter(directory)
    return model


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one and one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    assert one and one.keys() == other.keys()
    return all((value - other[name]).abs().max() <= tolerance for name, value in one.items())


def train(model: nn.Module, directory: Path, resume: bool = False, compute_metrics=None, **fields) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": 4, "save_steps": 2} | fields,
    )
    trainer = Trainer(model, arguments, train_dataset=data(), eval_dataset=data()[:8], compute_metrics=compute_metrics)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    whole = run(tmp_path / "whole", "--inside-lora")
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", "--inside-lora", "--kill-at-step", "6")
    assert killed.returncode == -signal.SIGKILL
    shutil.copytree(tmp_path / "killed", tmp_path / "without")
    (tmp_path / "without" / "checkpoints" / "checkpoint-4" / FILE).unlink()
    for name in ("killed", "without"):
        resumed = run(tmp_path / name, "--inside-lora", "--resume")
        assert resumed.returncode == 0, resumed.stderr
    expected, found, without = (
        (json.loads((tmp_path / name / "losses.json").read_text()), torch.load(tmp_path / name / "logits.pt"))
        for name in ("whole", "killed", "without")
    )
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    # Eight steps of Adam are behind the last one, each of which may enlarge the rounding of the first.
    torch.testing.assert_close(without[1], expected[1], atol=1e-5, rtol=0)


def test_resumed_in_this_process(tmp_path):
    """The weights are those of the checkpoint, the coefficients too, or to rounding without the second file."""
    trainer = train(adapted(trained=False), tmp_path)
    saved = tmp_path / "checkpoint-4"
    again = adapted()
    again.load_adapter(saved, "default", is_trainable=True)
    assert equal(coefficients(again), coefficients(trainer.model))
    (saved / FILE).unlink()
    for without in (adapted(), adapted()):
        without.load_adapter(saved, "default", is_trainable=True)
        assert close(coefficients(without), coefficients(trainer.model))


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_model_is_loaded_to_the_bit(tmp_path, limit):
    """The metric falls from one checkpoint to the next, so the first one is the best."""
    falling = iter(range(100, 0, -1))
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "falling",
        "greater_is_better": True,
        "save_total_limit": limit,
    }
    metrics = {"compute_metrics": lambda _: {"falling": next(falling)}}
    trainer = train(adapted(trained=False), tmp_path, **metrics, max_steps=6, **settings)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2" and (best / FILE).is_file()
    assert len(list(tmp_path.glob("checkpoint-*"))) == (limit or 3)
    file, found = load_file(best / FILE), coefficients(trainer.model)
    assert len(file) == len(found)
    for name, value in found.items():
        key = name.removeprefix("base_model.model.").replace(".default.factor", "")
        assert torch.equal(file[key], value)
    torch.testing.assert_close(logits(loaded_as_plain(best)), logits(trainer.model), atol=1e-6, rtol=1e-6)


LOADS_WITHOUT_THE_PLUGIN = """
import sys, warnings
sys.modules["wara_peft"] = None  # any import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
warnings.simplefilter("error", UserWarning)
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 25).view(4, 6)).logits, out)
"""


@pytest.mark.slow
def test_a_program_without_the_plugin_loads_it_without_a_warning(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        LORA,
        FILE,
    ]
    assert not {key for key in load_file(tmp_path / "adapter" / LORA) if "lora_" in key and "weight" not in key}
    words = [tmp_path / "base", tmp_path / "adapter", tmp_path / "logits.pt"]
    result = run_python("-c", LOADS_WITHOUT_THE_PLUGIN, *words)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), atol=1e-6, rtol=1e-6)


def test_the_config_is_that_of_plain_lora(tmp_path):
    """Nothing in the config says that the LoRA was reparametrised."""
    adapted().save_pretrained(tmp_path / "ours")
    get_peft_model(base_model(), lora()).save_pretrained(tmp_path / "plain")
    ours, plain = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "plain"))
    assert ours == plain


def test_several_adapters_resume_each_from_its_own_directory(tmp_path):
    adapters = {"default": lora(), "other": lora(5), "third": lora(target_modules=["value"])}
    model = adapted(**adapters)
    model.save_pretrained(tmp_path)
    assert {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(FILE)} == {".", "other", "third"}
    again = adapted(**adapters)
    for name in adapters:
        again.load_adapter(model_id=tmp_path if name == "default" else tmp_path / name, adapter_name=name)
        assert equal(coefficients(again, name), coefficients(model, name))
    # Trainer does so with the subfolders of a checkpoint.
    trainer = train(model, tmp_path / "run", max_steps=2)
    again = adapted(**adapters)
    train(again, tmp_path / "run", resume=True, max_steps=2)
    for name in adapters:
        assert equal(coefficients(again, name), coefficients(trainer.model, name))


def test_arguments_by_position_and_by_name(tmp_path):
    model = adapted(default=lora(), other=lora())
    model.save_pretrained(tmp_path / "a", True, ["other"])
    assert [path.parent.name for path in (tmp_path / "a").rglob(FILE)] == ["other"]
    model.save_pretrained(save_directory=str(tmp_path / "b"), selected_adapters=["default"], is_main_process=True)
    assert [path.parent.name for path in (tmp_path / "b").rglob(FILE)] == ["b"]
    for name in ("save_pretrained", "load_adapter"):  # programs look at what these take
        assert signature(getattr(model, name)) == signature(getattr(get_peft_model(base_model(), lora()), name))
    model.save_pretrained(tmp_path / "c", is_main_process=False)
    assert not list((tmp_path / "c").rglob(FILE))
    again = adapted(default=lora(), other=lora())
    again.load_adapter(tmp_path, "other", subfolder="a/other")
    assert equal(coefficients(again, "other"), coefficients(model, "other"))


def test_several_processes_may_save_to_one_place(tmp_path):
    """PEFT lets them, so a lock of the directory by another one stops nothing."""
    model = adapted()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    os.close(descriptor)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter_config.json", LORA, FILE}
    again = adapted()
    again.load_adapter(tmp_path, "default")
    assert equal(coefficients(again), coefficients(model))


def test_a_file_of_another_time_is_not_taken(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    old = (tmp_path / FILE).read_bytes()
    move(model)
    model.save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(old)
    again = adapted()
    again.load_adapter(tmp_path, "default")
    assert close(coefficients(again), coefficients(model))
    for key, weight in load_file(tmp_path / LORA).items():
        if "lora_" in key:
            place = key.removesuffix(".weight")
            torch.testing.assert_close(
                again.get_submodule(f"{place}.default").weight + 0, weight, atol=1e-6, rtol=1e-6
            )


@pytest.mark.parametrize("damage", ["cut off", "no safetensors", "empty", "other shapes", "integers", "one less"])
def test_a_damaged_file_is_said_in_a_sentence_or_left_aside(tmp_path, damage):
    model = adapted()
    model.save_pretrained(tmp_path)
    file, whole = tmp_path / FILE, (tmp_path / FILE).read_bytes()
    tensors = load_file(file)
    if damage == "cut off":
        file.write_bytes(whole[:-10])
    elif damage in ("no safetensors", "empty"):
        file.write_bytes(b"" if damage == "empty" else b"damaged" * 9)
    elif damage == "one less":
        save_file(dict(list(tensors.items())[1:]), file)
    else:
        save_file(
            {k: rows.int() if damage == "integers" else rows[:, 1:].contiguous() for k, rows in tensors.items()}, file
        )
    again = adapted()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.load_adapter(tmp_path, "default")
    said = [str(warning.message) for warning in caught if FILE in str(warning.message)]
    assert len(said) == (damage in ("cut off", "no safetensors", "empty"))
    assert close(coefficients(again), coefficients(model))
    assert all(module.remembered is None for module in again.modules() if hasattr(module, "remembered"))


def test_an_error_while_loading_forgets_the_file(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    (tmp_path / LORA).write_bytes(b"")
    with pytest.raises(Exception, match=r"(?i)header"):
        model.load_adapter(tmp_path, "default")
    assert all(module.remembered is None for module in model.modules() if hasattr(module, "remembered"))


def test_a_file_of_another_wavelet_changes_nothing(tmp_path):
    """Its coefficients have the shapes of the present ones, and make other weights."""
    adapted().save_pretrained(tmp_path)
    other = get_peft_model(base_model(), lora())
    reparametrize_lora(other, wavelet="haar")
    move(other)
    before = coefficients(other)
    with pytest.raises(ValueError, match=r"The weight of 'base_model.*lora_A.default' cannot become this one"):
        other.load_adapter(tmp_path, "default")
    assert equal(coefficients(other), before)


def test_a_copy_saves_its_own_values(tmp_path):
    model = adapted()
    torch.save(model, tmp_path / "model.pt")
    for index, copied in enumerate((deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False))):
        move(copied)
        copied.save_pretrained(tmp_path / str(index))
        again = adapted()
        again.load_adapter(tmp_path / str(index), "default")
        assert equal(coefficients(again), coefficients(copied))
        assert not close(coefficients(again), coefficients(model))


def test_a_narrower_dtype_resumes_to_the_bit(tmp_path):
    model = adapted().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = adapted().to(torch.bfloat16)
    again.load_adapter(tmp_path, "default", autocast_adapter_dtype=False)
    assert equal(coefficients(again), coefficients(model))


@pytest.mark.parametrize("kind", ["PeftModel", "add_adapter"])
@pytest.mark.parametrize("given", ["gathered", "state_dict()"])
def test_a_state_dict_that_is_given(tmp_path, kind, given):
    """DeepSpeed gathers parameters, so it gives coefficients; they may be other ones than the model has now."""
    if kind == "PeftModel":
        model = adapted()
    else:
        model = base_model()
        model.add_adapter(lora())
        reparametrize_lora(model, wavelet="db2")
        move(model)
    gathered = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if given == "state_dict()":
        gathered = model.state_dict()
    expected = {name: value.clone() for name, value in coefficients(model).items()}
    before = logits(model)
    keys = set(gathered)
    if given == "gathered":
        move(model)
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert set(gathered) == keys  # what belongs to the caller is as it was
    torch.testing.assert_close(logits(loaded_as_plain(tmp_path, kind)), before, atol=1e-6, rtol=1e-6)
    file = load_file(tmp_path / FILE)
    assert len(file) == len(expected)
    for name, value in expected.items():
        key = name.removeprefix("base_model.model.").replace(".default.factor", "")
        assert torch.equal(file[key], value)


def test_a_model_of_transformers_with_several_adapters_saves_the_active_one(tmp_path):
    model = base_model()
    for name in ("one", "two"):
        model.add_adapter(lora(), adapter_name=name)
        reparametrize_lora(model, name)
    move(model)
    for name in ("one", "two"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        file = load_file(tmp_path / name / FILE)
        for key, value in coefficients(model, name).items():
            assert torch.equal(file[key.replace(f".{name}.factor", "")], value)


def test_a_model_of_transformers_under_trainer(tmp_path):
    def made() -> BertForSequenceClassification:
        model = base_model()
        model.add_adapter(lora())
        reparametrize_lora(model)
        return model

    trainer = train(made(), tmp_path)
    assert (tmp_path / "checkpoint-2" / FILE).is_file()
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):
        train(made(), tmp_path, resume=True)  # Trainer resumes plain LoRA only of PeftModels too
    found = logits(loaded_as_plain(tmp_path / "checkpoint-4", "add_adapter"))
    torch.testing.assert_close(found, logits(trainer.model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["PeftModel", "add_adapter"])
def test_accelerates_own_checkpoints_resume_to_rounding(tmp_path, kind):
    """They have the whole model, with LoRA's weights and no second file; the moments of Adam are there to the bit."""

    def made() -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
        model = adapted() if kind == "PeftModel" else base_model()
        if kind == "add_adapter":
            model.add_adapter(lora())
            reparametrize_lora(model, wavelet="db2")
            move(model)
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        return accelerator, *accelerator.prepare(model, optimizer)

    def step(accelerator, model, optimizer) -> None:
        accelerator.backward(model.eval()(input_ids=TOKENS).logits.square().sum())
        optimizer.step()
        optimizer.zero_grad()

    accelerator, model, optimizer = made()
    step(accelerator, model, optimizer)
    accelerator.save_state(tmp_path)
    assert not {key for key in load_file(tmp_path / "model.safetensors") if ".factor." in key}
    other, resumed, moments = made()
    other.load_state(tmp_path)
    assert close(coefficients(resumed), coefficients(model))
    for one, two in zip(optimizer.state_dict()["state"].values(), moments.state_dict()["state"].values(), strict=True):
        assert torch.equal(one["exp_avg"], two["exp_avg"]) and torch.equal(one["exp_avg_sq"], two["exp_avg_sq"])
    step(accelerator, model, optimizer)
    step(other, resumed, moments)
    assert close(coefficients(resumed), coefficients(model), 1e-5)


def test_what_is_plain_again_saves_no_file(tmp_path):
    model = adapted()
    plain_lora(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    again = adapted()
    set_peft_model_state_dict(again, load_file(tmp_path / LORA))
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)
