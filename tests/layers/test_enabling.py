"""Disabling adapters for a while changes nothing of what trains; PEFT lets all active adapters train afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from tests.models import llama
from tests.references import Mlp
from wara_peft import WaRAConfig

FIELDS: list[dict[str, Any]] = [
    {"target_modules": ["up"]},
    {"target_modules": ["up"], "modules_to_save": ["head"]},
    {"target_modules": ["up"], "form": "grid", "grid_pairs": "shared", "num_prefix_tokens": 0},
    {"target_modules": ["up"], "form": "tiny", "r": 2},
]


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def toggle(model: PeftModel) -> None:
    with model.disable_adapter():
        adapted = [trains for name, trains in flags(model).items() if ".wara_" in name or "modules_to_save" in name]
        assert adapted and not any(adapted)
        with model.disable_adapter():
            pass
    model.base_model.enable_adapter_layers()


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("fields", FIELDS)
def test_a_loaded_adapter_trains_as_it_was_loaded(fields: dict[str, Any], is_trainable: bool, tmp_path: Path) -> None:
    get_peft_model(Mlp(), WaRAConfig(**fields)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Mlp(), tmp_path, is_trainable=is_trainable)
    before = flags(model)
    assert any(before.values()) is is_trainable
    toggle(model)
    assert flags(model) == before


@pytest.mark.parametrize("fields", FIELDS)
def test_what_its_user_froze_stays_frozen(fields: dict[str, Any]) -> None:
    model = get_peft_model(Mlp(), WaRAConfig(**fields))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters[0].requires_grad_(False)
    before = flags(model)
    assert any(before.values())
    toggle(model)
    assert flags(model) == before


def test_transformers_enabling_is_right_too(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(WaRAConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path))
    for switched, trains in ((model, True), (loaded, False)):
        before = flags(switched)
        assert any(before.values()) is trains
        switched.disable_adapters()
        assert not any(flags(switched).values())
        switched.enable_adapters()
        switched.enable_adapters()
        assert flags(switched) == before


def test_what_is_done_meanwhile_counts() -> None:
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], modules_to_save=["head"]))
    model.add_adapter("other", WaRAConfig(target_modules=["up", "down"], modules_to_save=["head"]))
    model.set_adapter("other")
    expected = flags(model)
    model.set_adapter("default")
    with model.disable_adapter():
        model.set_adapter("other")
    assert flags(model) == expected

    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"]))
    before = flags(model)
    with model.disable_adapter():
        model.add_adapter("other", WaRAConfig(target_modules=["down"]))
    found = flags(model)
    assert all(found[name] == trains for name, trains in before.items() if name in found)
    assert not any(trains for name, trains in found.items() if ".other." in name)


@pytest.mark.parametrize("second", [False, True])
def test_a_new_adapter_is_in_the_mode_of_its_base_layer(second: bool) -> None:
    """`from_pretrained` gives models in eval mode."""
    x = torch.randn(8, 12)
    base = Mlp().eval()
    model: nn.Module = base
    config = WaRAConfig(target_modules=["up"], wara_dropout=0.5, init_weights=False)
    if second:
        model = get_peft_model(base, WaRAConfig(target_modules=["up"])).eval()
        model.add_adapter("new", config)  # type: ignore[operator]
        model.set_adapter("new")  # type: ignore[operator]
    else:
        model = get_peft_model(base, config)
    dense = nn.Linear(12, 20)
    up = base.up
    dense.weight.data = up.base_layer.weight.data + up.get_delta_weight("new" if second else "default").detach()
    dense.bias = up.base_layer.bias
    torch.testing.assert_close(up(x), dense(x), rtol=1e-5, atol=1e-5)
    assert not any(module.training for module in base.modules())
    base.train()
    assert all(module.training for module in base.modules())
    assert not torch.allclose(up(x), dense(x), rtol=1e-2, atol=1e-2)


def test_of_bare_parameters_as_well() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "linear": nn.Linear(16, 16)}).eval()
    get_peft_model(attention, WaRAConfig(target_modules=["attention"], wara_dropout=0.5))
    assert not any(module.training for module in attention.modules())
