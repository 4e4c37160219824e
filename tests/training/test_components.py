"""Cutting adapters to some of their components: the dense update with the others zero, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.references import Mlp, module_shapes
from wara_peft import WaRAConfig, frozen_factors, to_lora
from wara_peft.layers.base import WaRALayer
from wara_peft.layers.lookup import layers_of
from wara_peft.training.components import keep_components, parameters_of_component, subband_of


class Net(nn.Module):
    """An embedding, a convolution with groups and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, groups=2, padding=1)
        self.out = nn.Linear(6, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.conv(self.words(tokens).transpose(1, 2)).transpose(1, 2))


def adapted(**fields) -> PeftModel:
    torch.manual_seed(0)
    fields = {"target_modules": ["words", "conv", "out"], "r": 3, "init_weights": False, **fields}
    return get_peft_model(Net(), WaRAConfig(**fields)).double()


TOKENS = torch.arange(10).view(2, 5)
KEPT = {"words": {"aa1": [2, 0], "dd1": [1]}, "out": {"ad1": [0, 1, 2]}}


@pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA", "ignore:levels=2 is more than is useful")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"levels": 2, "wavelet": "db2"},
        {"wara_alpha": 5.0, "use_rslora": True},
        {"alpha_pattern": {"out": 3.0}, "subband_ranks": {"aa0": 2}},
    ],
)
def test_it_is_the_adapter_with_the_others_zero(fields, tmp_path: Path):
    model, expected = adapted(**fields), adapted(**fields)
    coarse = f"aa{fields.get('levels', 1)}"
    kept = {"words": {coarse: [2, 0], "dd1": [1]}, "out": {"ad1": [0, 1, 2]}}
    for name, layer in layers_of(expected, "default").items():
        for band, rank in layer.wara_B["default"].ranks.items():
            for index in range(rank):
                if index not in kept.get(name, {}).get(band, ()):
                    layer.wara_B["default"].subband(band).data[:, index] = 0
    scalings = {name: layer.scaling["default"] for name, layer in layers_of(model, "default").items()}
    keep_components(model, "default", kept)
    assert type(model.base_model.model.conv) is nn.Conv1d
    torch.testing.assert_close(model(TOKENS), expected(TOKENS), rtol=1e-12, atol=1e-12)
    for name, layer in layers_of(model, "default").items():
        assert layer.scaling["default"] == pytest.approx(scalings[name], rel=1e-15)
        assert layer.total_rank("default") == 3
        delta = layers_of(expected, "default")[name].get_delta_weight("default")
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-12, atol=1e-12)
    assert [tuple(p.shape) for n, p in model.named_parameters() if "out.wara_A.default.level1" in n] == [(3, 3)]
    assert set(module_shapes(model)) == {"words", "out"}

    # It saves, loads, exports and merges as any other.
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net().double(), tmp_path, autocast_adapter_dtype=False)
    loaded.base_model.model.load_state_dict(model.base_model.model.state_dict())
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    lora_config, _ = to_lora(model)
    assert lora_config.r == 3 and lora_config.target_modules == {"words", "out"}
    torch.testing.assert_close(model.merge_and_unload()(TOKENS), expected(TOKENS), rtol=1e-12, atol=1e-12)


def test_order_scale_gradients_and_other_adapters_stay():
    model = adapted()
    model.add_adapter("other", WaRAConfig(target_modules=["out", "conv"], r=2))
    layer = model.base_model.model.out
    layer.scale_layer(2.0)
    rows, other = layer.wara_A["default"].subband("aa1").clone(), layer.wara_A["other"].subband("aa1").clone()
    keep_components(model, "default", {"out": {"aa1": [2, 0]}})
    assert torch.equal(layer.wara_A["default"].subband("aa1"), rows[[2, 0]])
    assert torch.equal(layer.wara_A["other"].subband("aa1"), other)
    assert layer.scaling["default"] == 2.0
    assert isinstance(model.base_model.model.conv, WaRALayer)  # which keeps the other adapter
    assert "default" not in model.base_model.model.conv.wara_A
    assert all(parameter.requires_grad for parameter in layer.wara_A["default"].parameters())
    assert not any(parameter.requires_grad for parameter in layer.wara_A["other"].parameters())
    model(TOKENS).sum().backward()
    assert layer.wara_B["default"].level1.grad.shape == (4, 2)


def test_biases_of_modules_that_lose_the_adapter_are_saved(tmp_path: Path):
    model = adapted(bias="wara_only")
    with torch.no_grad():
        model.base_model.model.conv.bias.add_(1)
        model.base_model.model.out.bias.add_(2)
    keep_components(model, "default", {"out": {"aa1": [0]}})
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net().double(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_layers_that_are_tied_follow():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 24}
    base = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))
    config = WaRAConfig(target_modules=["embed_tokens", "q"], ensure_weight_tying=True, init_weights=False)
    model = get_peft_model(base, config).eval()
    tokens = {"input_ids": torch.arange(6)[None], "labels": torch.arange(4)[None]}
    embedding = model.get_input_embeddings()
    name = embedding.module_name
    keep_components(model, "default", {name: {"aa1": [1]}})
    tied = [module for module in model.modules() if isinstance(module, WaRALayer)]
    assert len(tied) > 2 and all(layer.total_rank("default") == 1 for layer in tied)
    cut = model(**tokens).logits
    targets = model.peft_config["default"].target_modules
    assert name in targets and any("embed_tokens" in target for target in targets - {name})
    torch.testing.assert_close(model.merge_and_unload()(**tokens).logits, cut, atol=1e-5, rtol=1e-5)


def test_a_frozen_scope_that_is_open_does_not_keep_what_was_cut():
    model = adapted()
    with torch.no_grad(), frozen_factors(model):
        model(TOKENS)
        keep_components(model, "default", KEPT)
        inside = model(TOKENS)
    torch.testing.assert_close(inside, model(TOKENS), rtol=1e-12, atol=1e-12)


def test_where_a_row_lies_and_what_it_costs():
    model = adapted(levels=2, subband_ranks={"ad1": 1, "da1": 0, "aa0": 2})
    layer = layers_of(model, "default")["conv"]
    factor = layer.wara_A["default"]
    assert [subband_of(factor, index, level=1) for index in range(4)] == [
        ("ad1", 0),
        ("dd1", 0),
        ("dd1", 1),
        ("dd1", 2),
    ]
    assert subband_of(factor, 1, level=0) == ("aa0", 1) and subband_of(factor, 4, level=2) == ("ad2", 1)
    # A group has four channels in, a kernel of three, and six out; each level halves both.
    assert [parameters_of_component(layer, "default", level) for level in (0, 1, 2)] == [
        4 * 3 + 6,
        2 * 3 + 3,
        1 * 3 + 2,
    ]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"nowhere": {"aa1": [0]}}, "Module 'nowhere' has no adapter"),
        ({"out": {"aa1": [3]}}, r"Subband 'aa1' of module 'out' has 3 components; \[3\]"),
        ({"out": {"aa1": [1, 1]}}, "one twice"),
        ({"out": {"aa1": [-1]}}, "names others"),
        ({"out": {"aa2": [0]}}, "Subband 'aa2' of module 'out' has 0"),
        ({"out": {"aa1": []}}, "would be left"),
    ],
)
def test_wrong_input_changes_nothing(kept, message):
    model = adapted()
    before = model(TOKENS)
    with pytest.raises(ValueError, match=message):
        keep_components(model, "default", kept)
    assert torch.equal(model(TOKENS), before)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="form='shared', in which a subband has no pairs"):
        keep_components(adapted(form="shared"), "default", {"out": {"aa1": [0]}})
    with pytest.raises(ValueError, match="no adapter 'other'"):
        keep_components(adapted(), "other", {})
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="is merged into module"):
        keep_components(merged, "default", KEPT)
    model = get_peft_model(Mlp(8, 8), WaRAConfig(target_modules="all-linear"))
    assert layers_of(model, "default")
