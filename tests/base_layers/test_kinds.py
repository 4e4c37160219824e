"""Kinds of layers: a new one is one file, and a copy of a kind is that kind."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from wara_peft import WaRAConfig
from wara_peft.base_layers import kinds
from wara_peft.base_layers.kinds import KINDS, kind_of, shape_of
from wara_peft.base_layers.own_forward import has_own_forward, is_additive_in_weight
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.lora.export import to_lora

ROTATED = "tests.base_layers.rotated_kind"


@pytest.fixture
def rotated():
    """The module of the new kind, which goes again."""
    before = dict(KINDS), dict(kinds._BY_CLASS)
    yield importlib.import_module(ROTATED)
    sys.modules.pop(ROTATED)
    for table, entries in zip((KINDS, kinds._BY_CLASS), before, strict=True):
        table.clear()
        table.update(entries)


def model_of(rotated):
    torch.manual_seed(0)
    return nn.ModuleDict({"turn": rotated.RotatedLinear(12, 7), "rest": nn.Linear(7, 3)})


def config_of(**fields):
    return WaRAConfig(r=2, wavelet="db2", target_modules=["turn"], init_weights=False, **fields)


class TestANewKind:
    def test_is_adapted_and_trains(self, rotated):
        model = get_peft_model(model_of(rotated), config_of())
        layer = model.base_model.model["turn"]
        x = torch.randn(5, 12)
        delta = layer.get_delta_weight("default")
        assert type(layer) is rotated.Rotated and layer.kind is KINDS["RotatedLinear"] and delta.shape == (12, 7)
        expected = x.flip(-1) @ (layer.base_layer.weight + delta) + layer.base_layer.bias
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        layer(x).sum().backward()
        assert all(parameter.grad.any() for parameter in layer.wara_A.parameters())

    def test_is_saved_read_and_loaded(self, rotated, tmp_path):
        model = get_peft_model(model_of(rotated), config_of(bias="wara_only"))
        layer = model.base_model.model["turn"]
        with torch.no_grad():
            layer.bias.add_(1)
        model.save_pretrained(tmp_path)
        shapes = json.loads((tmp_path / "adapter_config.json").read_text())["module_shapes"]
        assert shapes == {"turn": ["RotatedLinear", 7, 12]}
        saved = SavedAdapter(tmp_path)
        assert saved.weight_shape("turn") == (12, 7)
        torch.testing.assert_close(saved.update("turn").dense(), layer.get_delta_weight("default"))
        loaded = PeftModel.from_pretrained(model_of(rotated), tmp_path)
        x = torch.randn(5, 12)
        torch.testing.assert_close(loaded.base_model.model["turn"](x), layer(x))
        file = tmp_path / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(file).items() if not key.endswith("bias")}, file)
        with pytest.raises(ValueError, match="lacks the bias of 'turn'"):
            SavedAdapter(tmp_path)

    def test_merges(self, rotated):
        model = get_peft_model(model_of(rotated), config_of())
        layer, x = model.base_model.model["turn"], torch.randn(5, 12)
        expected, before = layer(x), layer.base_layer.weight.clone()
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight, before)
        torch.testing.assert_close(model.merge_and_unload()["turn"](x), expected, rtol=1e-4, atol=1e-4)

    def test_whose_subclass_computes_something_else_does_not_merge(self, rotated):
        class Squared(rotated.RotatedLinear):
            def forward(self, x):
                return x.flip(-1) @ self.weight.square()

        assert kind_of(Squared(4, 3)).name == "RotatedLinear"
        assert (
            has_own_forward(Squared(4, 3))
            and not is_additive_in_weight(Squared(4, 3))
            and is_additive_in_weight(rotated.RotatedLinear(4, 3))
        )

    def test_is_exported_and_combined(self, rotated):
        model = get_peft_model(model_of(rotated), config_of())
        layer = model.base_model.model["turn"]
        with pytest.warns(UserWarning, match=r"adapters of RotatedLinear layers \('turn'\)"):
            config, tensors = to_lora(model)
        prefix = "base_model.model.turn"
        product = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        assert config.target_modules == {"turn"} and config.fan_in_fan_out is False
        torch.testing.assert_close(product.T, layer.get_delta_weight("default"))
        model.add_adapter("other", config_of())
        model.base_model.add_weighted_adapter(["default", "other"], [2.0, 1.0], "svd", "svd", svd_rank=7)
        expected = 2 * layer.get_delta_weight("default") + layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("svd"), expected, rtol=1e-4, atol=1e-4)

    def test_is_known_without_its_file_only_as_an_unknown_class(self, rotated):
        layer = rotated.RotatedLinear(4, 3)
        KINDS.pop("RotatedLinear")
        kinds._BY_CLASS.pop(rotated.RotatedLinear)
        with pytest.raises(TypeError, match=r"is not supported. WaRA adapts .*torch.nn.modules.linear.Linear`"):
            get_peft_model(nn.ModuleDict({"turn": layer}), config_of())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda kind: pickle.loads(pickle.dumps(kind))])
def test_a_copy_of_a_kind_is_the_kind(copied):
    assert all(copied(kind) is kind for kind in KINDS.values())


def test_a_copied_model_with_an_attention_exports_alike():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}),
        WaRAConfig(r=2, target_modules=["attention"], init_weights=False),
    )
    with pytest.warns(UserWarning, match="nn.MultiheadAttention"):
        _, tensors = to_lora(model)
        _, of_copy = to_lora(copy.deepcopy(model))
    assert "base_model.model.attention.lora_A.weight" in tensors
    assert of_copy.keys() == tensors.keys()


def test_a_subclass_is_of_its_nearest_kind():
    class Own(Conv1D):
        pass

    assert kind_of(Own(3, 4)).name == "Conv1D" and shape_of(Own(3, 4)).lengths == (3, 4)


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.Conv1d(4, 6, 3), "conv"), (Conv1D(6, 4), "conv1d"), (nn.Linear(4, 6), "linear")]
)
def test_the_weight_of_a_layer_of_any_kind_is_no_bare_parameter(layer, name):
    with pytest.raises(ValueError, match=f"it is the weight of a layer. Name the layer, '{name}'"):
        get_peft_model(nn.ModuleDict({name: layer}), WaRAConfig(target_parameters=[f"{name}.weight"]))
