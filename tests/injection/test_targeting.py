"""Which modules and tokens are adapted, and what trains: the same as with LoRA, for every way to say it."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM

from tests import models
from tests.references import Mlp
from wara_peft import WaRAConfig
from wara_peft.layers.base import WaRALayer

TOKENS = torch.arange(1, 25).view(4, 6)

# fields of both configs: one row a case
CASES = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r"model\.layers\.[01]\.mlp\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "defaults of the architecture": {},
    "exclude by name": {
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj", "model.layers.0.mlp.up_proj"],
    },
    "exclude by regex": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1.*"},
    "layer 0": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers 0 and 2": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "layer 0 of a pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "layer 0 of patterns": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["h", "layers"]},
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    "tokens of a layer": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [2]}},
}


def llama() -> nn.Module:
    return models.llama(num_hidden_layers=3, attention_bias=True)


def adapted_modules(model: PeftModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def trained_beside_adapters(model: PeftModel) -> set[str]:
    prefixes = ("wara_A", "wara_B", "lora_A", "lora_B")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for name in names if not any(f".{prefix}." in name for prefix in prefixes)}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("case", CASES)
def test_as_in_lora(case, tmp_path):
    ours = get_peft_model(llama(), WaRAConfig(**CASES[case]))
    theirs = get_peft_model(llama(), LoraConfig(**CASES[case]))
    assert adapted_modules(ours) == adapted_modules(theirs) != set()
    assert trained_beside_adapters(ours) == trained_beside_adapters(theirs)

    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        ours.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    expected = logits(ours)
    assert not torch.allclose(expected, logits(llama()))
    ours.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    torch.testing.assert_close(logits(copy.deepcopy(ours).merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


def test_biases_of_adapted_modules():
    ours = get_peft_model(llama(), WaRAConfig(target_modules=["q_proj"], bias="wara_only"))
    theirs = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], bias="lora_only"))
    assert trained_beside_adapters(ours) == trained_beside_adapters(theirs) != set()


def test_set_requires_grad():
    model = get_peft_model(llama(), WaRAConfig(target_modules=["q_proj"]))
    model.add_adapter("other", WaRAConfig(target_modules=["q_proj"]))

    def trainable() -> set[str]:
        return {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}

    model.set_requires_grad("other")
    assert trainable() == {"default", "other"}
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert trainable() == set()


@pytest.mark.slow
@pytest.mark.parametrize("config_class", [WaRAConfig, partial(WaRAConfig, form="tiny"), LoraConfig])
def test_offloaded_to_disk(config_class, tmp_path, monkeypatch):
    """Layers that accelerate keeps on the disk compute, load adapters and merge."""
    monkeypatch.chdir(tmp_path)  # PEFT takes the offload folder's path for a relative one, and writes below this one
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_class(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "wara_B" in name or "wara_core" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")

    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    loaded = PeftModel.from_pretrained(
        offloaded,
        tmp_path / "adapter",
        device_map={f"base_model.model.{name}": device for name, device in device_map.items()},
        offload_dir=str(tmp_path / "offload_adapter"),
    )
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=1e-6)
    with loaded.disable_adapter():
        without = logits(loaded)
    if config_class is not LoraConfig:
        before = logits(loaded)
        last = [module for module in loaded.modules() if isinstance(module, WaRALayer)][-1]
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(last, "set_base_weight", Mock(side_effect=MemoryError))
            loaded.merge_adapter()
        assert last.base_layer.weight.is_meta and torch.equal(logits(loaded), before)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    assert any(parameter.is_meta for parameter in loaded.parameters())
    loaded.unmerge_adapter()
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), without, atol=0 if config_class is not LoraConfig else 1e-5, rtol=0)


@pytest.mark.parametrize("fields", [{"target_modules": ["up", "upp"]}, {"alpha_pattern": {"upp": 3}}])
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(fields):
    model, config = Mlp(), WaRAConfig(**{"target_modules": ["up"], **fields})
    with warnings.catch_warnings(), pytest.raises(RuntimeWarning, match="upp"):
        warnings.simplefilter("error")
        get_peft_model(model, config)
    assert type(model.up) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())
    get_peft_model(model, WaRAConfig(target_modules=["up"]))
