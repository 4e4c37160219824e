"""Names of adapters and of modules: what is an adapter's tensor is told by layers, not by how a key reads."""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tests.references import Mlp
from wara_peft import WaRAConfig, to_lora
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.injection import adapter_names
from wara_peft.layers.base import WaRALayer
from wara_peft_cli.app import app

WEIGHTS = "adapter_model.safetensors"


class Nested(nn.Module):
    """Adapted modules and others on paths of several parts, one of which reads as the name of a part of adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.ModuleDict({"mlp": Mlp(), "other": Mlp()})
        self.norm = nn.LayerNorm(12)
        self.inner = nn.ModuleDict({"wara_head": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["wara_head"](self.stack["other"](x) + self.stack["mlp"](self.norm(x)))


def saved_by_peft(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


CONFIGS = {
    "factors": {"target_modules": ["mlp.up"]},
    "in full": {"target_modules": ["other.down"], "modules_to_save": ["wara_head"]},
    "biases": {"target_modules": ["other.up"], "bias": "all"},
    "own biases": {"target_modules": ["other.up"], "bias": "wara_only"},
    "gains": {"target_modules": ["other.up"], "form": "grid", "grid_pairs": "shared", "grid_size": (2, 2)},
}
# What may be on a path: names of modules, and what PEFT and the layers put there.
NAMES = sorted({part for name, _ in Nested().named_modules() for part in name.split(".") if not part.isdigit()} - {""})
PARTS = (
    "base_layer",
    "modules_to_save",
    "original_module",
    "wara_A",
    "wara_gain",
    "weight",
    "bias",
    "model",
    "level1",
)


PAIRS = [
    ("factors", "factors"),
    ("factors", "in full"),
    ("in full", "factors"),
    ("biases", "in full"),
    ("own biases", "factors"),
    ("gains", "in full"),
]


@lru_cache
def keys_alone(case: str) -> Set[str]:
    return saved_by_peft(get_peft_model(Nested(), WaRAConfig(**CONFIGS[case])), "default").keys()


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [*((*pair, name) for pair in PAIRS for name in NAMES), *(("factors", "factors", name) for name in PARTS)],
)
def test_a_name_is_refused_exactly_where_a_file_would_lose_something(first, second, name, monkeypatch):
    def added() -> nn.Module:
        model = get_peft_model(Nested(), WaRAConfig(**CONFIGS[first], init_weights=False))
        model.add_adapter(name, WaRAConfig(**CONFIGS[second], init_weights=False))
        return model

    alone = {"default": keys_alone(first), name: keys_alone(second)}
    model = get_peft_model(Nested(), WaRAConfig(**CONFIGS[first], init_weights=False))
    before = list(model.state_dict())
    try:
        model.add_adapter(name, WaRAConfig(**CONFIGS[second], init_weights=False))
    except ValueError as error:
        assert f"{name!r}" in str(error)
        assert list(model.peft_config) == ["default"]
        assert list(model.state_dict()) == before
        if name in adapter_names.OF_PARTS or name == "level1":
            return  # those that every adapter has, whatever it adapts
        monkeypatch.setattr("wara_peft.injection.targets.check_saved_apart", lambda *args: None)
        try:
            model = added()
            found = {adapter: saved_by_peft(model, adapter) for adapter in alone}
        except (ValueError, KeyError):
            return  # PEFT itself does not get so far
        assert any(found[adapter].keys() != keys for adapter, keys in alone.items())
        return
    for adapter, keys in alone.items():
        assert saved_by_peft(model, adapter).keys() == keys


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT takes `wara_head` for one of an adapter's
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CONFIGS)
def test_the_only_adapter_may_have_the_name_of_a_module_that_is_not_saved_in_full(case, name, tmp_path):
    expected = keys_alone(case)
    try:
        model = get_peft_model(Nested(), WaRAConfig(**CONFIGS[case], init_weights=False), adapter_name=name)
    except ValueError as error:
        assert f"{name!r}" in str(error)
        ends = {part for key in expected if "wara_A" not in key for part in key.split(".")[-2:]}
        assert name in {*ends, *CONFIGS[case].get("modules_to_save", ())}
        return
    assert saved_by_peft(model, name).keys() == expected
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Nested(), tmp_path / name, adapter_name=name)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    found = dict(loaded.named_parameters())
    assert all(torch.equal(found[key], value) for key, value in trained.items())


def test_it_is_refused_wherever_adapters_come_from(tmp_path):
    get_peft_model(Nested(), WaRAConfig(**CONFIGS["factors"])).save_pretrained(tmp_path)
    model = get_peft_model(Nested(), WaRAConfig(**CONFIGS["factors"]))
    refused = "adapter_name='mlp' is also the name of a module on the path to 'stack.mlp.up'"
    with pytest.raises(ValueError, match=refused):
        model.load_adapter(tmp_path, "mlp")
    with pytest.raises(ValueError, match=refused):
        model.base_model.add_weighted_adapter(["default"], [2.0], "mlp")
    assert list(model.peft_config) == ["default"]
    model = get_peft_model(Nested(), WaRAConfig(target_modules=["other.up"]), adapter_name="mlp")
    with pytest.raises(ValueError, match="'new' cannot be added beside 'mlp', which has the name of a module"):
        model.add_adapter("new", WaRAConfig(**CONFIGS["factors"]))
    model = Nested()
    inject_adapter_in_model(WaRAConfig(target_modules=["other.up"]), model, adapter_name="mlp")


def test_a_module_trained_in_full_may_be_called_as_adapters_parts_are(tmp_path):
    """In a model that counts batches, whose tensor is no float."""
    model = get_peft_model(Nested(), WaRAConfig(**CONFIGS["in full"], init_weights=False))
    head = model.base_model.model.inner["wara_head"].modules_to_save["default"]
    nn.init.normal_(head[0].weight)
    model.save_pretrained(tmp_path)
    names = {f"inner.wara_head.{key}": value for key, value in head.state_dict().items()}
    assert SavedAdapter(tmp_path).others.keys() == names.keys()
    for source in (model, tmp_path):
        with pytest.warns(UserWarning, match="engines that serve LoRA"):
            _, state_dict = to_lora(source)
        for name, value in names.items():
            assert torch.equal(state_dict[f"base_model.model.{name}"], value)
    loaded = PeftModel.from_pretrained(Nested(), tmp_path)
    assert torch.equal(loaded.base_model.model.inner["wara_head"].modules_to_save["default"][0].weight, head[0].weight)


def test_it_is_merged_into_a_checkpoint(tmp_path):
    config = BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9, num_labels=3
    )
    base = BertForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    base.bert.encoder.wara_layer = base.bert.encoder.layer  # as a class of one's own might call it
    fields = {"target_modules": ["query"], "modules_to_save": ["classifier"], "init_weights": False}
    model = get_peft_model(BertForSequenceClassification.from_pretrained(tmp_path / "base"), WaRAConfig(**fields))
    model.save_pretrained(tmp_path / "adapter")
    app(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "merged")], standalone_mode=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key, value in merged.items():
        torch.testing.assert_close(value, expected[key])


def test_injection_by_a_state_dict_takes_names_of_factors_only():
    model = get_peft_model(Nested(), WaRAConfig(**CONFIGS["in full"]))
    state_dict = {key.removeprefix("base_model.model."): v for key, v in saved_by_peft(model, "default").items()}
    assert "inner.wara_head.0.weight" in state_dict
    base = Nested()
    inject_adapter_in_model(WaRAConfig(target_modules=["other.down"]), base, state_dict=state_dict)
    assert [name for name, module in base.named_modules() if isinstance(module, WaRALayer)] == ["stack.other.down"]
