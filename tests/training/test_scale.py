"""`rescale_adapter_scale`: a factor for a while, which takes back only what it has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale as peft_rescale

from tests.references import Mlp
from wara_peft import WaRAConfig, rescale_adapter_scale, to_lora


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"], init_weights=False))
    model.base_model.model.down.set_scale("default", 3.0)
    return model


@pytest.mark.parametrize("multiplier", [0, 0.3, 1, 2.5])
def test_the_scope_multiplies_delta_weight(model: PeftModel, multiplier: float) -> None:
    layers = model.base_model.model.up, model.base_model.model.down
    before = [layer.get_delta_weight("default") for layer in layers]
    with rescale_adapter_scale(model, multiplier):
        for layer, delta in zip(layers, before, strict=True):
            torch.testing.assert_close(layer.get_delta_weight("default"), multiplier * delta)
    assert all(torch.equal(x.get_delta_weight("default"), delta) for x, delta in zip(layers, before, strict=True))


def test_what_is_set_inside_stays(model: PeftModel) -> None:
    up, down = model.base_model.model.up, model.base_model.model.down
    with rescale_adapter_scale(model, 0.1):
        up.set_scale("default", 7.0)
    assert up.scaling == {"default": 7.0} and down.scaling == {"default": 3.0}


def test_adapters_that_come_and_go_inside(model: PeftModel) -> None:
    """A new one had no scaling afterwards, and added nothing; of a deleted one the scaling came back."""
    model.add_adapter("gone", WaRAConfig(target_modules=["up"]))
    with rescale_adapter_scale(model, 0.5):
        model.add_adapter("new", WaRAConfig(target_modules=["up"], init_weights=False))
        model.delete_adapter("gone")
    up = model.base_model.model.up
    assert up.scaling == {"default": 1.0, "new": 1.0}
    x = torch.randn(2, 12)
    model.set_adapter("new")
    torch.testing.assert_close(up(x), up.base_layer(x) + x @ up.get_delta_weight("new").T)


def test_an_error_inside_takes_it_back_too(model: PeftModel) -> None:
    with pytest.raises(RuntimeError), rescale_adapter_scale(model, 0.5):
        raise RuntimeError
    assert model.base_model.model.up.scaling == {"default": 1.0}


def test_it_is_what_peft_does_with_the_exported_lora() -> None:
    base = Mlp()
    model = get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["up", "down"], init_weights=False))
    config, tensors = to_lora(model)
    lora = get_peft_model(copy.deepcopy(base), config)
    set_peft_model_state_dict(lora, tensors)
    x = torch.randn(5, 12)
    before = model(x)
    with rescale_adapter_scale(model, 0.3), peft_rescale(lora, 0.3):
        torch.testing.assert_close(model(x), lora(x), atol=1e-5, rtol=1e-5)
        assert (model(x) - before).abs().max() > 0.1
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="LoraLayer"), peft_rescale(model, 0.3):  # what PEFT's own says of WaRA
        pass


def test_what_it_refuses(model: PeftModel) -> None:
    with (
        pytest.raises(TypeError, match="multiplier must be a number, and is 'half'"),
        rescale_adapter_scale(model, "half"),
    ):
        pass
    with pytest.raises(ValueError, match="no WaRA adapters"), rescale_adapter_scale(Mlp(), 0.3):
        pass
