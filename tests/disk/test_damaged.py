"""Files that lack something, or contradict each other, are refused or named by everything that reads them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tests.references import Chain, Mlp
from wara_peft import WaRAConfig, save_as_lora
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.inspection.saved_adapter import inspect_adapter
from wara_peft.layers.base import WaRALayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMS = {
    "subband": {"levels": 2},
    "shared": {"form": "shared"},
    "tiny": {"form": "tiny", "r": 2},
    "grid": {"form": "grid", "grid_size": (2, 2)},
    "gains": {"form": "grid", "grid_size": (2, 2), "grid_pairs": "shared", "r": 2},
    "undecomposed": {"subband_ranks": {"aa0": 2}},
}


def saved(path: Path, make=Mlp, **fields) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "levels=. is more than is useful")
        fields = {"target_modules": ["up"], "init_weights": False, **fields}
        model = get_peft_model(make(), WaRAConfig(**fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(".bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(path)
    return model


def without(path: Path, *ends: str) -> None:
    tensors = load_file(path / WEIGHTS)
    kept = {key: value for key, value in tensors.items() if not key.endswith(ends)}
    assert len(kept) < len(tensors)
    save_file(kept, path / WEIGHTS)


def edit_config(path: Path, **fields) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | fields))


@pytest.mark.filterwarnings("ignore:levels=. is more than is useful")
@pytest.mark.parametrize("form", FORMS)
def test_each_missing_tensor_is_refused(form, tmp_path):
    saved(tmp_path, **FORMS[form])
    whole = load_file(tmp_path / WEIGHTS)
    assert whole
    for key in whole:
        save_file({name: value for name, value in whole.items() if name != key}, tmp_path / WEIGHTS)
        name = key.removeprefix("base_model.model.")
        with pytest.raises(ValueError, match=f"lacks '{name}'"):
            inspect_adapter(SavedAdapter(tmp_path))
        with pytest.raises(ValueError, match="not all of those of adapter 'default' in module 'up'"):
            PeftModel.from_pretrained(Mlp(), tmp_path)
    save_file({"base_model.model.up.bias": torch.zeros(20)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="lacks"):
        SavedAdapter(tmp_path)


def test_a_module_without_any_tensor_is_refused(tmp_path):
    saved(tmp_path, target_modules=["up", "down"])
    without(tmp_path, "down.wara_A.level1", "down.wara_B.level1")
    base = Mlp()
    with pytest.raises(ValueError, match=r"lacks 'down\.wara_A\.default\.level1', 'down\.wara_B\.default\.level1'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, WaRALayer) for module in base.modules())


def test_an_adapter_whose_tensors_are_refused_is_taken_out_again(tmp_path):
    saved(tmp_path)
    without(tmp_path, "wara_A.level1")
    base = Mlp()
    with pytest.raises(ValueError, match="not all of those of adapter 'default'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, WaRALayer) for module in base.modules())
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], init_weights=False), "first")
    with pytest.raises(ValueError, match="not all of those of adapter 'second'"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["first"]
    assert not any(".second." in key for key in model.state_dict())


def test_a_deleted_adapter_is_not_awaited_under_the_name_of_a_new_one(tmp_path):
    saved(tmp_path, bias="wara_only")
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["down"]), "first")
    model.add_adapter("second", WaRAConfig.from_pretrained(tmp_path))
    model.delete_adapter("second")
    model.add_adapter("second", WaRAConfig(target_modules=["up"], init_weights=False))
    tensors = {key: torch.randn_like(value) for key, value in get_peft_model_state_dict(model, None, "second").items()}
    set_peft_model_state_dict(model, tensors, "second")
    found = get_peft_model_state_dict(model, adapter_name="second")
    assert tensors and found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


CHANGES = {
    "tiny": ({}, {"form": "tiny"}),
    "grid": ({}, {"form": "grid"}),
    "of tiny": (FORMS["tiny"], {"form": "subband"}),
    "of grid": (FORMS["grid"], {"form": "subband", "grid_size": None}),
    "fewer levels": ({"levels": 2, "subband_ranks": {"ad2": 0}}, {"levels": 1, "subband_ranks": None, "r": 3}),
    "more levels": ({}, {"levels": 2}),
    "no aa0": (FORMS["undecomposed"], {"subband_ranks": None}),
    "an aa0": ({}, {"subband_ranks": {"aa0": 2}}),
    "gains": ({"form": "grid", "grid_size": (2, 2), "r": 2}, {"grid_pairs": "shared", "r": 8}),
    "no gains": (FORMS["gains"], {"grid_pairs": "separate"}),
    "core": (FORMS["tiny"], {"core": "diagonal"}),
    "no basis": (FORMS["tiny"], {"save_basis": False, "base_weight_hashes": None}),
}


@pytest.mark.filterwarnings("ignore:levels=. is more than is useful")
@pytest.mark.parametrize("case", CHANGES)
def test_a_config_that_the_tensors_contradict_is_refused(case, tmp_path):
    fields, changes = CHANGES[case]
    saved(tmp_path, **fields)
    PeftModel.from_pretrained(Mlp(), tmp_path)
    edit_config(tmp_path, **changes)
    said = "of another form, of other levels or ranks|size mismatch"
    with pytest.raises((ValueError, RuntimeError), match=said):
        PeftModel.from_pretrained(Mlp(), tmp_path)
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["down"]))
    with pytest.raises((ValueError, RuntimeError), match=said):
        model.load_adapter(tmp_path, "other")
    with pytest.raises(ValueError):
        SavedAdapter(tmp_path)


class Mixed(nn.Module):
    """Layers of which some have a bias, an attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Chain(depth=3).layers
        self.low = nn.Linear(8, 8)
        self.att = nn.MultiheadAttention(8, 2)
        self.tokens = nn.Embedding(5, 8)
        self.norm = nn.LayerNorm(8)


ADAPTED = {"target_modules": ["0", "1", "2", "low", "att", "tokens"]}


@pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA|PEFT's LoRA|bias=.* in the config says")
@pytest.mark.parametrize("bias", ["wara_only", "all"])
def test_a_missing_bias_is_not_passed_over(bias, tmp_path):
    saved(tmp_path, Mixed, **ADAPTED, bias=bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SavedAdapter(tmp_path)
        PeftModel.from_pretrained(Mixed(), tmp_path)
    without(tmp_path, "layers.1.base_layer.bias", "low.base_layer.bias")
    for read in (SavedAdapter, lambda path: save_as_lora(tmp_path / "lora", path)):
        said = rf"lacks the bias of 'layers\.1', 'low', which trained with bias='{bias}'"
        with pytest.raises(ValueError, match=said):
            read(tmp_path)
    assert not (tmp_path / "lora").exists()
    base = Mixed()
    with pytest.raises(ValueError, match=r"promises 'layers\.1\.base_layer\.bias', 'low\.base_"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, WaRALayer) for module in base.modules())


@pytest.mark.parametrize(("bias", "end"), [("wara_only", "out_proj.bias"), ("all", "norm.bias")])
def test_biases_that_the_first_version_did_not_save_are_named_at_loading(bias, end, tmp_path):
    model = saved(tmp_path, Mixed, **ADAPTED, bias=bias)
    without(tmp_path, end)
    with pytest.warns(UserWarning, match=f"bias='{bias}' in the config .* promises '.*{end}'"):
        loaded = PeftModel.from_pretrained(Mixed(), tmp_path)
    found, expected = (dict(of.named_parameters()) for of in (loaded, model))
    kept = [name for name in expected if name.endswith("bias") and not name.endswith(end)]
    assert all(torch.equal(found[name], expected[name]) for name in kept)


@pytest.mark.parametrize("bias", ["wara_only", "all"])
def test_a_config_of_the_first_version_does_not_name_biases_and_warns(bias, tmp_path):
    saved(tmp_path, Mixed, **ADAPTED, bias=bias)
    without(tmp_path, "layers.1.base_layer.bias", "low.base_layer.bias")
    edit_config(tmp_path, biased_modules=None)
    said = f"bias='{bias}' in the config says that biases were trained, and .* has none of 'layers.1', 'low'. Unless"
    with pytest.warns(UserWarning, match=said):
        SavedAdapter(tmp_path)


def test_merging_into_a_checkpoint_refuses_a_missing_bias(tmp_path):
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    base = BertForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", lambda: copy.deepcopy(base), target_modules=["query", "key"], bias="wara_only")
    without(tmp_path / "adapter", "query.base_layer.bias")
    with pytest.raises(ValueError, match=r"lacks the bias of '.*query', which trained"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
