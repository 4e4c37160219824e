"""Everything that trains is in the file: a fresh model that loads it has every parameter that required gradients."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from wara_peft import WaRAConfig, save_as_lora
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.factorized import DictionaryLinear, LowRankLinear

AROUND = re.compile(r"\.(base_layer|original_module|modules_to_save\.default|token_adapter)(?=\.)")
SIZE = 8


class Stack(nn.Module):
    """Bare parameters, of a mixture's experts and a matrix beside them, with a bias of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, SIZE, SIZE))
        self.router = nn.Parameter(torch.randn(3, SIZE))
        self.bias = nn.Parameter(torch.randn(3))


class Everything(nn.Module):
    """A layer of each kind that can be adapted, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, SIZE)
        self.first = nn.Linear(SIZE, SIZE)
        self.plain = nn.Linear(SIZE, SIZE, bias=False)
        self.proj = Conv1D(SIZE, SIZE)
        self.conv1, self.conv2 = nn.Conv1d(SIZE, SIZE, 3), nn.Conv2d(SIZE, SIZE, 3, groups=2)
        self.conv3 = nn.Conv3d(SIZE, SIZE, 1)
        self.att = nn.MultiheadAttention(SIZE, 2)
        self.stack = Stack()
        self.low = LowRankLinear(SIZE, SIZE, 4)
        self.dictionary = DictionaryLinear(SIZE, SIZE, 6, 3)
        self.norm = nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, 3)


# What is adapted, and the biases that belong to it.
KINDS = {
    "linear": ({"target_modules": ["first", "plain"]}, {"first.bias"}),
    "shared": ({"target_modules": ["first"], "form": "shared"}, {"first.bias"}),
    "tiny": ({"target_modules": ["first"], "form": "tiny", "r": 2}, {"first.bias"}),
    "grid": ({"target_modules": ["first"], "form": "grid", "grid_size": (2, 2)}, {"first.bias"}),
    "gains": (
        {"target_modules": ["first"], "form": "grid", "grid_size": (2, 2), "grid_pairs": "shared"},
        {"first.bias"},
    ),
    "conv1d": ({"target_modules": ["proj"]}, {"proj.bias"}),
    "embedding": ({"target_modules": ["tokens"]}, set()),
    "convolutions": (
        {"target_modules": ["conv1", "conv2", "conv3"]},
        {"conv1.bias", "conv2.bias", "conv3.bias"},
    ),
    "attention": ({"target_modules": ["att"]}, {"att.out_proj.bias"}),
    "experts": ({"target_modules": [], "target_parameters": ["stack.experts"]}, {"stack.bias"}),
    "two parameters": (
        {"target_modules": [], "target_parameters": ["stack.experts", "stack.router"]},
        {"stack.bias"},
    ),
    "factorised": ({"target_modules": ["low", "dictionary"]}, {"low.up.bias", "dictionary.bias"}),
}
BESIDE = [
    {},
    {"modules_to_save": ["norm", "head", "low"]},
    {"modules_to_save": ["head"], "trainable_token_indices": {"tokens": [1, 3]}},
]


def filled(base: nn.Module, **fields) -> PeftModel:
    """A model with an adapter, with random numbers in all that trains."""
    model = get_peft_model(base, WaRAConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def biases_of(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        AROUND.sub("", name.removeprefix("base_model.model.")): value
        for name, value in parameters.items()
        if name.endswith(".bias") and ".original_module." not in name
    }


@pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA|PEFT's LoRA|bias=.* has none of 'plain'")
@pytest.mark.parametrize("bias", ["none", "wara_only", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_is_loaded(kind, bias, tmp_path):
    fields, own = KINDS[kind]
    for number, beside in enumerate(BESIDE):
        targets = set(fields["target_modules"])
        if targets & {*beside.get("modules_to_save", ()), *beside.get("trainable_token_indices", ())}:
            continue
        path = tmp_path / str(number)
        model = filled(Everything(), **fields, **beside, bias=bias)
        found = trained(model)
        whole = {key: value for key, value in Everything().named_parameters() if key.endswith("bias")}
        in_full = tuple(f"{name}." for name in beside.get("modules_to_save", ()))
        expected = {"none": set(), "wara_only": own, "all": {key for key in whole if not key.endswith("in_proj_bias")}}
        assert set(biases_of(found)) == expected[bias] | {key for key in whole if key.startswith(in_full)}
        model.save_pretrained(path)
        loaded = dict(PeftModel.from_pretrained(Everything(), path).named_parameters())
        assert [name for name in found if not torch.equal(found[name], loaded[name])] == []
        assert sum("wara" in name for name in found) >= 1

        if beside or bias == "none" or kind in ("grid", "gains", "factorised"):
            continue
        for source in (model, path):
            save_as_lora(path / "lora", source)
            lora = PeftModel.from_pretrained(Everything(), path / "lora")
            of_lora = biases_of(dict(lora.named_parameters()))
            for name, value in biases_of(found).items():
                assert torch.equal(of_lora[name], value), name


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["att"], "modules_to_save": ["out_proj"]},
        {"target_modules": ["first"], "target_parameters": ["stack.experts"], "modules_to_save": ["stack"]},
        {"target_modules": ["low"], "modules_to_save": ["low.up"]},
        {"target_modules": ["tokens"], "trainable_token_indices": {"tokens": [1]}},
    ],
)
def test_what_could_not_be_saved_is_refused_before_anything_is_changed(fields):
    model = Everything()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="is to train in full or has rows of tokens that do, by `modules_to_save`"):
        get_peft_model(model, WaRAConfig(**fields))
    assert [type(module) for module in model.modules()] == before
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name != "dictionary.columns")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [1, 2]}},
    ],
)
def test_what_only_a_tie_adapts_is_refused_before_anything_is_changed(fields):
    model = llama(tie_word_embeddings=True)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="is to train in full or has rows of tokens that do"):
        get_peft_model(model, WaRAConfig(**fields, ensure_weight_tying=True))
    assert list(model.state_dict()) == before


def test_two_names_of_one_layer_of_tokens_are_refused():
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"tokens": nn.Embedding(5, 4)}), "up": nn.Linear(4, 4)})
    both = {"encoder.tokens": [1], "tokens": [2]}
    with pytest.raises(ValueError, match=r"'encoder\.tokens' and 'tokens', which both mean 'encoder\.tokens'"):
        get_peft_model(model, WaRAConfig(target_modules=["up"], trainable_token_indices=both))


def llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, attention_bias=True, **sizes, **fields))


TIED = [
    {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["lm_head"], "bias": "all"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "wara_only"},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3], "bias": "all"},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [2]}},
]


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`|Model has `tie_word_embeddings|Model with `tie_word"
)
@pytest.mark.filterwarnings("ignore:Could not find a config file|You specified `ensure_weight_tying`")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fields", TIED)
def test_with_tied_weights(fields, tied, tmp_path):
    model = filled(llama(tie_word_embeddings=tied), **fields)
    model.save_pretrained(tmp_path)
    loaded = dict(PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path).named_parameters())
    found = trained(model)
    assert found and [name for name in found if not torch.equal(found[name], loaded[name])] == []


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_are_saved(targets, tied, tmp_path):
    """New rows are drawn whenever a model is resized."""
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def resized(seed: int) -> LlamaForCausalLM:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(15, mean_resizing=False)
        return model.eval()

    tokens = torch.arange(15)[None]
    base = resized(1)
    model = filled(base, target_modules=targets)
    model.save_pretrained(tmp_path / "adapter")
    expected = model(tokens).logits
    loaded = PeftModel.from_pretrained(resized(2), tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens).logits, expected)
    kept = {"lm_head.weight", "embed_tokens.weight"} if targets == ["q_proj"] else set()
    files = SavedAdapter(tmp_path / "adapter").others
    assert {key.removeprefix("model.") for key in files if ".base_layer." not in key} == (
        kept
        if tied or len(targets) > 1 or kept
        else {"embed_tokens.weight", "lm_head.weight"} - {f"{targets[0]}.weight"}
    )


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_that_were_not_resized_are_left_out(tmp_path):
    llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model = filled(LlamaForCausalLM.from_pretrained(tmp_path / "base"), target_modules=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    assert set(SavedAdapter(tmp_path / "adapter").others) == {"lm_head.base_layer.weight"}
