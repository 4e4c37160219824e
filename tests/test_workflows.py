"""Whole workflows as users run them: Trainer, kill and resume, a fresh process, AutoPeftModel, SFTTrainer."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.forked_python import run_python
from tests.references import tiny_vit
from tests.training_run import base_model, data, logits
from wara_peft import WaRAConfig

WEIGHTS = "adapter_model.safetensors"


run = partial(run_python, "-m", "tests.training_run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("trained")
    result = run(directory)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.mark.slow
def test_losses_fall(trained):
    losses = list(json.loads((trained / "losses.json").read_text()).values())
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.slow
def test_reload_in_a_fresh_process_is_bit_equal(trained):
    assert torch.load(trained / "logits.pt").isfinite().all()
    result = run(trained, "--load")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_killed_and_resumed_training_has_the_losses_of_an_uninterrupted_run(trained, tmp_path):
    killed = run(tmp_path, "--kill-at-step", "6")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "losses.json").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]

    resumed = run(tmp_path, "--resume")

    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "losses.json").read_text()) == json.loads((trained / "losses.json").read_text())
    assert torch.equal(torch.load(tmp_path / "logits.pt"), torch.load(trained / "logits.pt"))


def test_auto_peft_model(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = type(base_model()).from_pretrained(tmp_path / "base")
    config = WaRAConfig(target_modules="all-linear", init_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(logits(loaded), logits(model))


@pytest.fixture
def language_model(tmp_path) -> Path:
    """Directory of a tiny causal model with a tokenizer of a few words."""
    words = ["the", "cat", "dog", "sat", "ran", "on", "mat", "grass"]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "base")
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.filterwarnings("ignore:.*flash")
def test_sft_trainer(language_model, tmp_path, packing):
    texts = ["the cat sat on the mat", "the dog ran on the grass"] * 16
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        learning_rate=3e-2,
        per_device_train_batch_size=1 if packing else 8,
        packing=packing,
        max_length=64,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=str(language_model),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        peft_config=WaRAConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model(str(tmp_path / "adapter"))

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    tokens = torch.tensor([[1, 4, 5, 7, 8]])
    assert loaded.peft_config["default"].peft_type == "WARA"
    trained, found = map(get_peft_model_state_dict, (trainer.model, loaded))
    assert trained.keys() == found.keys() and all(torch.equal(found[key], value) for key, value in trained.items())
    torch.testing.assert_close(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


FORMS = {
    "subband": {"form": "subband"},
    "grid": {"form": "grid"},
    "grid, shared pair": {"form": "grid", "grid_pairs": "shared", "levels": 2},
    "tiny": {"form": "tiny"},
    "tiny, basis not saved": {"form": "tiny", "core": "diagonal", "save_basis": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_trainer_on_images_resumes_with_the_losses_of_an_uninterrupted_run(form, tmp_path):
    """Classes are dark, grey and bright images."""
    labels = torch.arange(48) % 3
    noise = torch.randn(48, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    pixels = 10 * (labels.view(-1, 1, 1, 1) - 1) + noise
    images = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]

    def run(directory: Path, resume: bool = False) -> Trainer:
        torch.manual_seed(0)
        base = tiny_vit()
        fields = {"target_modules": ["q_proj", "fc1", "fc2"], "wara_dropout": 0.1, **FORMS[form]}
        model = get_peft_model(base, WaRAConfig(modules_to_save=["classifier"], **fields))
        arguments = TrainingArguments(
            output_dir=str(directory),
            per_device_train_batch_size=12,
            max_steps=12,
            learning_rate=2e-2,
            logging_steps=1,
            save_steps=6,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=images)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6") if resume else None)
        return trainer

    def losses(trainer: Trainer) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run(tmp_path / "whole")
    assert sum(losses(whole)[-3:]) < sum(losses(whole)[:3])
    resumed = run(tmp_path / "resumed", resume=True)
    assert losses(resumed) == losses(whole)
    x = torch.stack([image["pixel_values"] for image in images])
    whole.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, whole.model.eval()(x).logits)
        assert torch.equal(loaded(x).logits, resumed.model.eval()(x).logits)


@pytest.mark.parametrize("config_class", [WaRAConfig, LoraConfig])
def test_load_best_model_at_end(config_class, tmp_path):
    """The score of the second epoch is given as the best one, so that neither the first nor the last is it."""
    scores = iter([1.0, 3.0, 2.0, 0.0])
    model = get_peft_model(base_model(), config_class(target_modules="all-linear", task_type="SEQ_CLS"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=4,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data(),
        eval_dataset=data(),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    first, best, third, last = (load_file(tmp_path / f"checkpoint-{6 * epoch}" / WEIGHTS) for epoch in (1, 2, 3, 4))
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-12"
    found = get_peft_model_state_dict(model)
    assert found.keys() == best.keys()
    assert all(torch.equal(found[key], value) for key, value in best.items())
    for other in (first, third, last):
        assert all(not torch.equal(other[key], value) for key, value in best.items())


def test_what_a_lora_user_asks_a_model(capsys):
    models = [
        get_peft_model(base_model(), config)
        for config in (
            WaRAConfig(target_modules="all-linear", task_type="SEQ_CLS"),
            LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
        )
    ]
    printed = []
    for model in models:
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
        assert type(model.get_base_model()) is type(base_model())
    assert printed[0] == printed[1]
    ours, theirs = (model.get_layer_status() for model in models)
    assert [status.name for status in ours] == [status.name for status in theirs]
    for status in ours[:-1]:  # the last is the head, which trains in full
        assert (status.module_type, status.enabled, status.active_adapters) == ("wara.Linear", True, ["default"])
        assert (status.merged_adapters, status.available_adapters) == ([], ["default"])
        assert (status.requires_grad, status.devices) == ({"default": True}, {"default": ["cpu"]})
