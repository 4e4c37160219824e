"""Whatever makes a LoRA that trains makes a reparametrised one, if the environment says so; all else stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BertForSequenceClassification, BertModel
from transformers.integrations.peft import PeftAdapterMixin

from tests.diffusion_models import unet
from tests.lora.test_reparametrize_checkpoints import base_model, close, coefficients, equal, logits, lora, move
from wara_peft import WaRAConfig, plain_lora
from wara_peft.lora.automatic import VARIABLE, obey_environment
from wara_peft.lora.coefficients_file import FILE
from wara_peft.lora.reparametrized_layers import ReparametrizedLayer

WRAPPED = [
    *((kind, name) for kind in (PeftModel, PeftMixedModel) for name in ("__init__", "add_adapter", "from_pretrained")),
    (PeftModel, "load_adapter"),
    (PeftAdapterMixin, "load_adapter"),
    *((module, "inject_adapter_in_model") for module in (peft, peft.mapping)),
]


@pytest.fixture(autouse=True)
def automatic(monkeypatch) -> None:
    """What `wara-peft run --reparametrize-lora --wavelet db2` does in a process, until the test ends."""
    for holder, name in WRAPPED:
        monkeypatch.setattr(holder, name, vars(holder)[name])  # so that it comes back
    monkeypatch.setenv(VARIABLE, json.dumps({"wavelet": "db2"}))
    obey_environment()
    obey_environment()  # as a reload does


def kinds(model: nn.Module, adapter: str = "default") -> set[bool]:
    """Whether the factors of the adapter are reparametrised."""
    factors = [
        layer_factors[adapter]
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for layer_factors in (layer.lora_A, layer.lora_B)
        if adapter in layer_factors
    ]
    assert factors
    return {isinstance(factor, ReparametrizedLayer) for factor in factors}


def added_by_transformers() -> BertForSequenceClassification:
    model = base_model()
    model.add_adapter(lora())
    return model


def added_by_diffusers() -> UNet2DConditionModel:
    model = unet()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"]))
    return model


def added_to_another() -> PeftModel:
    model = get_peft_model(base_model(), lora(), adapter_name="first")
    model.add_adapter("default", lora())
    return model


def mixed() -> PeftMixedModel:
    model = get_peft_model(base_model(), LoHaConfig(target_modules=["value"]), adapter_name="loha", mixed=True)
    model.add_adapter("default", LoraConfig(r=4, target_modules=["query"]))
    return model


MAKERS = {
    "get_peft_model": lambda: get_peft_model(base_model(), lora()),
    "get_peft_model without a task": lambda: get_peft_model(base_model(), lora(task_type=None)),
    "get_peft_model in bfloat16": lambda: get_peft_model(base_model().to(torch.bfloat16), lora()),
    "PeftModel": lambda: PeftModel(base_model(), lora()),
    "mixed": lambda: get_peft_model(base_model(), LoraConfig(r=4, target_modules=["query"]), mixed=True),
    "added to a mixed model": mixed,
    "add_adapter": added_to_another,
    "transformers": added_by_transformers,
    "diffusers": added_by_diffusers,
    "peft.inject_adapter_in_model": lambda: peft.inject_adapter_in_model(lora(), base_model()),
    "peft.mapping": lambda: peft.mapping.inject_adapter_in_model(lora(), base_model()),
}


@pytest.mark.parametrize("made", MAKERS.values(), ids=MAKERS.keys())
def test_whatever_makes_a_lora(made, capfd):
    model = made()
    assert kinds(model) == {True}
    assert {module.factor.axis.wavelet for module in model.modules() if isinstance(module, ReparametrizedLayer)} == {
        "db2"
    }
    said = capfd.readouterr().err.splitlines()
    said = [line for line in said if line.startswith("wara-peft: LoRA 'default': ")]
    trained = sum(parameter.numel() for parameter in coefficients(model).values())
    plain_lora(model, "default")
    plain = [p for name, p in model.named_parameters() if name.endswith("default.weight") and "lora_" in name]
    modules = len(plain) // 2
    assert len(said) == 1
    assert f"{modules} modules train in the wavelet domain: {trained:,} parameters in place of" in said[0]
    assert f"of {sum(parameter.numel() for parameter in plain):,} (" in said[0]


def test_one_of_the_processes_of_a_machine_says_it(monkeypatch, capfd):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert kinds(MAKERS["get_peft_model"]()) == {True}
    assert "wara-peft" not in capfd.readouterr().err


@pytest.fixture
def saved(tmp_path) -> Iterator[tuple[nn.Module, Path]]:
    model = get_peft_model(base_model(), lora())
    move(model)
    model.save_pretrained(tmp_path)
    yield model, tmp_path


def from_pretrained(path: Path, trains: bool, **others) -> nn.Module:
    return PeftModel.from_pretrained(base_model(), path, is_trainable=trains, **others)


def load_adapter(path: Path, trains: bool, **others) -> nn.Module:
    model = get_peft_model(base_model(), lora(), adapter_name="first")
    plain_lora(model)
    assert not {"load_adapter", "save_pretrained"} & set(vars(model))  # they are PEFT's own again
    model.load_adapter(path, "default", is_trainable=trains, **others)
    model.set_adapter("default")
    return model


def load_adapter_beside(path: Path, trains: bool, **others) -> nn.Module:
    model = get_peft_model(base_model(), lora(), adapter_name="first")
    model.load_adapter(str(path), adapter_name="default", is_trainable=trains, **others)
    model.set_adapter("default")
    return model


LOADERS = [from_pretrained, load_adapter, load_adapter_beside]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("load", LOADERS)
def test_what_is_loaded_to_train(saved, load, low_cpu_mem_usage):
    model, path = saved
    found = load(path, True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert kinds(found) == {True}
    assert equal(coefficients(found), coefficients(model))
    assert all(p.requires_grad for name, p in found.named_parameters() if ".default.factor." in name)
    (path / FILE).unlink()
    assert close(coefficients(load(path, True, low_cpu_mem_usage=low_cpu_mem_usage)), coefficients(model))
    torch.testing.assert_close(logits(found), logits(model), atol=1e-6, rtol=1e-6)
    move(found)  # and it is saved with its own second file
    found.save_pretrained(path / "again")
    again = load(path / "again", True)
    assert equal(coefficients(again), coefficients(found))


@pytest.mark.parametrize("load", LOADERS)
def test_what_is_loaded_for_inference_stays(saved, load):
    model, path = saved
    found = load(path, False)
    assert kinds(found) == {False}
    torch.testing.assert_close(logits(found), logits(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("trains", [True, False])
def test_what_transformers_loads(tmp_path, trains):
    model = BertModel(base_model().config)
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(lora(task_type=None))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    for file in (True, False):
        found = BertModel.from_pretrained(tmp_path / "base")
        found.load_adapter(str(tmp_path / "adapter"), is_trainable=trains)
        assert kinds(found) == {trains}
        if trains:
            assert (equal if file else close)(coefficients(found), coefficients(model))
        (tmp_path / "adapter" / FILE).unlink(missing_ok=True)
    expected, given = (m.eval()(torch.arange(1, 7)[None]).last_hidden_state for m in (model, found))
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-6)


def test_what_diffusers_loads_for_inference_stays(tmp_path):
    model = added_by_diffusers()
    move(model)
    model.save_lora_adapter(tmp_path)
    found = unet()
    found.load_lora_adapter(tmp_path, prefix=None, adapter_name="default", use_safetensors=True)
    assert kinds(found) == {False}
    plain_lora(model)
    ours, theirs = ({name: value for name, value in m.state_dict().items() if "lora_" in name} for m in (model, found))
    assert equal(ours, theirs)


def test_combinations_frozen_adapters_and_other_methods_stay():
    model = get_peft_model(base_model(), lora(task_type=None), adapter_name="first")
    model.add_adapter("default", lora(task_type=None))
    model.add_weighted_adapter(["first", "default"], [1.0, 1.0], "combined", combination_type="cat")
    assert kinds(model, "combined") == {False} and kinds(model) == {True}
    assert kinds(get_peft_model(base_model(), lora(inference_mode=True))) == {False}
    for config in (
        AdaLoraConfig(target_modules=["query"], total_step=10),
        IA3Config(target_modules=["query"], feedforward_modules=[]),
        WaRAConfig(target_modules=["query"]),
    ):
        model = get_peft_model(base_model(), config)
        assert not any(isinstance(module, ReparametrizedLayer) for module in model.modules())


def test_a_checkpoint_is_loaded_over_an_adapter_that_is_there(saved):
    """Trainer resumes so."""
    model, path = saved
    again = get_peft_model(base_model(), lora())
    again.load_adapter(path, "default", is_trainable=True)
    assert equal(coefficients(again), coefficients(model))


def test_a_copy_as_reference(saved):
    """TRL's trainers copy the parameters of the adapter one by one to another one of the same config."""
    model, _ = saved
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = logits(model)
    model.set_adapter("ref")
    assert kinds(model, "ref") == {True}
    torch.testing.assert_close(logits(model), expected, atol=1e-7, rtol=1e-7)


def test_what_cannot_be_reparametrised_is_refused(tmp_path):
    """A program that is to train in the wavelet domain does not train in another way without a word."""
    for config, text in (
        (lora(r=3), "has r=3"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lora(target_modules=["word_embeddings"]), "LoRA of embeddings"),
    ):
        with pytest.raises(
            ValueError, match="LoRA 'default' cannot train in the wavelet domain, as wara-peft"
        ) as error:
            get_peft_model(base_model(), config)
        assert text in str(error.value) and "trains as plain LoRA" in str(error.value)
    model = get_peft_model(base_model(), lora())
    plain_lora(model)
    move(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"The LoRA of 'base_model.*query' has values that cannot be taken over"):
        from_pretrained(tmp_path, True)
    assert kinds(from_pretrained(tmp_path, False)) == {False}
