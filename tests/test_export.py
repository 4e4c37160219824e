"""A WaRA adapter exported as a LoRA: PEFT's own LoRA loads it and computes the same."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

from tests.references import Conv1DModel, Mlp
from wara_peft import WaRAConfig, save_as_lora, to_lora

# model, input width, config: one row a case
CASES = {
    "linear": (Mlp, 12, {"target_modules": ["up", "down"]}),
    "three levels": (Mlp, 12, {"target_modules": ["up", "down"], "wavelet": "db4", "levels": 3, "wara_alpha": 5}),
    "shared": (Mlp, 12, {"target_modules": ["up"], "form": "shared", "wavelet": "sym4", "use_rslora": True}),
    "unequal ranks": (Mlp, 12, {"target_modules": ["up", "down"], "rank_pattern": {"up": {"aa1": 9, "dd1": 0}}}),
    "unequal alphas": (Mlp, 12, {"target_modules": ["up", "down"], "wara_alpha": 2, "alpha_pattern": {"up": 30}}),
    "odd sizes": (lambda: Mlp(width=7, hidden=13), 7, {"target_modules": ["up", "down"], "levels": 2}),
    "undecomposed": (Mlp, 12, {"target_modules": r"up|down", "subband_ranks": {"aa0": 3}}),
    "conv1d": (Conv1DModel, 9, {"target_modules": ["proj"], "wavelet": "db2"}),
    "with a head": (Mlp, 12, {"target_modules": ["up"], "modules_to_save": ["head"]}),
    "with biases": (Mlp, 12, {"target_modules": ["up", "down"], "bias": "wara_only"}),
}


def adapted(case: str) -> tuple[nn.Module, PeftModel, torch.Tensor]:
    make, width, fields = CASES[case]
    base = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "levels=. is more than is useful")
        model = get_peft_model(copy.deepcopy(base), WaRAConfig(init_weights=False, **fields)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "wara" not in name:
            nn.init.normal_(parameter)
    return base, model, torch.randn(5, width)


@pytest.mark.parametrize("case", CASES)
def test_lora_computes_the_same(case, tmp_path):
    base, model, x = adapted(case)
    save_as_lora(tmp_path, model)

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()

    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_it_is_exact_and_uniform(case):
    _, model, _ = adapted(case)
    config, state_dict = to_lora(model)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "wara_A")}
    largest = max(layer.total_rank("default") for layer in layers.values())

    assert config.r == config.lora_alpha == largest
    assert not (config.use_rslora or config.use_dora or config.rank_pattern or config.alpha_pattern)
    assert config.target_modules == {name.removeprefix("base_model.model.") for name in layers}
    assert config.base_model_name_or_path == model.peft_config["default"].base_model_name_or_path
    for name, layer in layers.items():
        factor_a, factor_b = state_dict[f"{name}.lora_A.weight"], state_dict[f"{name}.lora_B.weight"]
        assert (factor_a.shape, factor_b.shape) == ((largest, layer.in_features), (layer.out_features, largest))
        delta = layer.double().get_delta_weight("default")
        delta = delta.T if layer.kind == "Conv1D" else delta
        torch.testing.assert_close(factor_b.double() @ factor_a.double(), delta, atol=1e-6, rtol=1e-6)
    assert all(value.is_contiguous() for value in state_dict.values())
    assert not any("wara" in key for key in state_dict)


def test_files(tmp_path):
    _, model, _ = adapted("linear")
    save_as_lora(tmp_path / "new" / "directory", model)
    found = sorted(path.name for path in (tmp_path / "new" / "directory").iterdir())
    assert found == ["adapter_config.json", "adapter_model.safetensors"]
    keys = set(load_file(tmp_path / "new" / "directory" / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.{m}.lora_{side}.weight" for m in ("up", "down") for side in "AB"}
    config = json.loads((tmp_path / "new" / "directory" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 16, 16)


@pytest.mark.parametrize("rank", [4, 0.9])
def test_a_rank_gives_the_best_approximation(rank):
    _, model, _ = adapted("unequal ranks")
    _, state_dict = to_lora(model, rank=rank)
    for name in ("up", "down"):
        layer = getattr(model.base_model.model, name)
        u, s, vh = torch.linalg.svd(layer.get_delta_weight("default").double())
        energy = (s**2).cumsum(0) / (s**2).sum()
        kept = rank if isinstance(rank, int) else int((energy < rank).sum()) + 1
        best = (u[:, :kept] * s[:kept]) @ vh[:kept]
        prefix = f"base_model.model.{name}.lora_"
        found = state_dict[f"{prefix}B.weight"].double() @ state_dict[f"{prefix}A.weight"].double()
        torch.testing.assert_close(found, best, atol=1e-5, rtol=1e-5)


def test_adapter_of_another_name():
    _, model, _ = adapted("linear")
    model.add_adapter("other", WaRAConfig(r=1, target_modules=["up"], init_weights=False))
    config, state_dict = to_lora(model, adapter_name="other")
    assert config.r == 4
    assert set(state_dict) == {"base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"}
    delta = model.base_model.model.up.get_delta_weight("other")
    product = state_dict["base_model.model.up.lora_B.weight"] @ state_dict["base_model.model.up.lora_A.weight"]
    torch.testing.assert_close(product, delta)


@pytest.mark.parametrize("rank", [None, 16])
def test_adapters_of_transformers(rank, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    base = BertModel(config).eval()
    model = copy.deepcopy(base)
    model.add_adapter(WaRAConfig(target_modules=["query", "dense"], init_weights=False))
    save_as_lora(tmp_path, model, rank=rank)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    tokens = torch.arange(1, 7).view(1, 6)
    expected = model.eval()(tokens).last_hidden_state
    assert not torch.allclose(expected, base(tokens).last_hidden_state, atol=1e-2)
    torch.testing.assert_close(loaded(tokens).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


class TestBadInput:
    def test_unknown_adapter(self):
        _, model, _ = adapted("linear")
        with pytest.raises(ValueError, match="no adapter 'other', only 'default'"):
            to_lora(model, adapter_name="other")
        with pytest.raises(ValueError, match="no adapter 'default', only none"):
            to_lora(Mlp())

    def test_adapter_of_another_method(self):
        with pytest.raises(TypeError, match="is of type LORA, not WARA"):
            to_lora(get_peft_model(Mlp(), LoraConfig(target_modules=["up"])))

    def test_path_is_a_file(self, tmp_path):
        _, model, _ = adapted("linear")
        path = tmp_path / "file"
        path.write_text("mine")
        with pytest.raises(ValueError, match="is a file; name a directory"):
            save_as_lora(path, model)
        assert path.read_text() == "mine"
