"""A saved LoRA goes on as a WaRA adapter, which computes what PEFT's LoRA does and trains with subbands beside it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.models import llama
from wara_peft import WaRAConfig, load_lora, save_as_lora, to_lora
from wara_peft.layers.base import WaRALayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["tokens", "up", "proj", "conv"]


class Model(nn.Module):
    """A layer of each kind that both LoRA and WaRA adapt, some of odd sizes, and a head."""

    def __init__(self, **convolution) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 13)
        self.proj = Conv1D(6, 13)
        self.conv = nn.Conv2d(6, 4, 3, stride=2, padding=1, **convolution)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = self.proj(torch.tanh(self.up(self.tokens(x)))).transpose(1, 2)  # (batch, 6, tokens)
        features = self.conv(channels.unflatten(2, (3, -1))).mean((2, 3))
        return self.head(self.norm(features))


INPUTS = torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(0))


def trained_lora(path: Path, model: nn.Module, **fields) -> PeftModel:
    """PEFT's LoRA in float64 with random numbers in all that it trains, saved."""
    fields = {"target_modules": TARGETS, "r": 4, "lora_alpha": 6, **fields}
    lora = get_peft_model(model.double(), LoraConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`|Could not find a config file")
        lora.save_pretrained(path)
    return lora


def layers_of(model: nn.Module, layer_class: type) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, layer_class)}


def lora_pairs(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every module as they are in a LoRA's file."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path / WEIGHTS).items():
        name, found, rest = key.partition(".lora_")
        if found:
            pairs.setdefault(name, {})["B" if "B" in rest.removesuffix(".weight") else "A"] = value
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def assert_equal_to_lora(model: nn.Module, lora: nn.Module, path: Path, adapter: str = "default") -> None:
    layers, lora_layers = layers_of(model, WaRALayer), layers_of(lora, LoraLayer)
    assert layers.keys() == lora_layers.keys() == lora_pairs(path).keys()
    for name, (factor_a, factor_b) in lora_pairs(path).items():
        ours = layers[name].factors(adapter)
        assert torch.equal(ours[0].subband("aa0"), factor_a)
        assert torch.equal(ours[1].subband("aa0"), factor_b.flatten(1))
        assert layers[name].scaling[adapter] == pytest.approx(lora_layers[name].scaling["default"], rel=1e-14)
        torch.testing.assert_close(
            layers[name].get_delta_weight(adapter),
            lora_layers[name].get_delta_weight("default"),
            rtol=1e-12,
            atol=1e-14,
        )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"levels": 2, "wavelet": "db2", "r": 2},
        {"subband_ranks": {"aa1": 3, "ad1": 0, "da1": 1, "dd1": 0}},
        {"subband_ranks": {"aa1": 0, "ad1": 0, "da1": 0, "dd1": 0}},
    ],
)
@pytest.mark.parametrize(
    "lora_fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up": 3, "con.*": 5}, "alpha_pattern": {"up|proj": 11, "tokens": 1}},
        {"rank_pattern": {"proj": 2}, "alpha_pattern": {"proj": 7}, "use_rslora": True, "lora_alpha": 0.5},
    ],
)
@pytest.mark.filterwarnings("ignore:levels=. is more than is useful")
def test_it_computes_what_the_lora_computes(tmp_path, lora_fields, fields):
    base = Model()
    lora = trained_lora(tmp_path, copy.deepcopy(base), **lora_fields)
    model = load_lora(base.double(), tmp_path, **fields).eval()
    assert_equal_to_lora(model, lora, tmp_path)
    torch.testing.assert_close(model(INPUTS), lora(INPUTS), rtol=1e-12, atol=1e-13)
    ranks = WaRAConfig(**{**fields, "subband_ranks": {**fields.get("subband_ranks", {}), "aa0": 1}}).ranks_of("")
    for layer in layers_of(model, WaRALayer).values():
        found = layer.factors("default")[0].ranks
        assert {name: found.get(name, 0) for name in ranks if name != "aa0"} == {
            name: rank for name, rank in ranks.items() if name != "aa0"
        }


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_the_lora_trained_in_full_comes_along(tmp_path, bias):
    base = Model()
    lora = trained_lora(tmp_path, copy.deepcopy(base), bias=bias, modules_to_save=["head"], lora_dropout=0.25)
    model = load_lora(base.double(), tmp_path).eval()
    torch.testing.assert_close(model(INPUTS), lora(INPUTS), rtol=1e-12, atol=1e-13)
    assert_equal_to_lora(model, lora, tmp_path)
    config = model.peft_config["default"]
    assert (config.bias, config.modules_to_save) == ("wara_only" if bias == "lora_only" else bias, ["head"])
    assert config.wara_dropout == 0.25
    assert not config.inference_mode
    # All that trained trains again, biases and head beside the factors.
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "wara_" not in name}
    assert trains == {name for name, p in lora.named_parameters() if p.requires_grad and "lora_" not in name}


def test_subbands_learn_beside_it(tmp_path):
    base = Model()
    trained_lora(tmp_path, copy.deepcopy(base), modules_to_save=["head"])
    model = load_lora(base.double(), tmp_path, r=2).eval()
    labels = torch.arange(5) % 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(INPUTS), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    pairs = lora_pairs(tmp_path)
    for name, layer in layers_of(model, WaRALayer).items():
        factor_a, factor_b = layer.factors("default")
        assert not torch.equal(factor_a.subband("aa0"), pairs[name][0])
        assert not torch.equal(factor_b.subband("aa0"), pairs[name][1].flatten(1))
        for band in ("aa1", "ad1", "da1", "dd1"):
            product = torch.einsum("mr,rn...->mn...", factor_b.subband(band), factor_a.subband(band))
            assert product.abs().max() > 0, (name, band)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`|Could not find a config file|PEFT loads all")
def test_it_saves_and_exports_as_any_other(tmp_path):
    base = Model()
    lora = trained_lora(tmp_path / "lora", copy.deepcopy(base), rank_pattern={"up": 3}, use_rslora=True)
    model = load_lora(copy.deepcopy(base).double(), tmp_path / "lora").eval()
    model.save_pretrained(tmp_path / "wara")
    again = PeftModel.from_pretrained(copy.deepcopy(base).double(), tmp_path / "wara").eval()
    torch.testing.assert_close(again(INPUTS), lora(INPUTS), rtol=1e-12, atol=1e-13)
    # B of the new subbands is zero, so that ΔW keeps the LoRA's rank.
    assert to_lora(tmp_path / "wara", rank=4)[0].r == 4
    save_as_lora(tmp_path / "again", model)
    exported = PeftModel.from_pretrained(copy.deepcopy(base).double(), tmp_path / "again").eval()
    torch.testing.assert_close(exported(INPUTS), lora(INPUTS), rtol=1e-12, atol=1e-13)


def test_beside_an_adapter_that_is_there(tmp_path):
    base = Model()
    lora = trained_lora(tmp_path, copy.deepcopy(base), bias="none", modules_to_save=["head"])
    model = get_peft_model(base.double(), WaRAConfig(target_modules=["up", "conv"], modules_to_save=["head"])).eval()
    before = model(INPUTS)
    assert load_lora(model, tmp_path, "second") is model
    assert model.active_adapter == "default"
    torch.testing.assert_close(model(INPUTS), before)
    model.set_adapter("second")
    torch.testing.assert_close(model(INPUTS), lora(INPUTS), rtol=1e-12, atol=1e-13)
    assert_equal_to_lora(model, lora, tmp_path, "second")
    with pytest.raises(ValueError, match="'second' already exists"):
        load_lora(model, tmp_path, "second")


def test_beside_a_lora_is_refused(tmp_path):
    lora = trained_lora(tmp_path, Model())
    modules = [type(module) for module in lora.modules()]
    with pytest.raises(ValueError, match="different peft types"):
        load_lora(lora, tmp_path, "second")
    assert [type(module) for module in lora.modules()] == modules
    assert list(lora.peft_config) == ["default"]


def test_a_classifier_of_transformers(tmp_path):
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 17, "num_labels": 3}
    base = GPT2ForSequenceClassification(GPT2Config(pad_token_id=0, **sizes)).eval()
    lora = trained_lora(
        tmp_path, copy.deepcopy(base), target_modules=["c_attn", "c_fc"], task_type="SEQ_CLS", fan_in_fan_out=True
    )
    model = load_lora(base.double(), tmp_path).eval()
    assert type(model) is type(lora)
    tokens = INPUTS + 1
    torch.testing.assert_close(model(tokens).logits, lora(tokens).logits, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("resized", [False, True])
def test_tokens_and_resized_embeddings(tmp_path, resized):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=19, tie_word_embeddings=False, **sizes)).eval()
    fields = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    if resized:
        base.resize_token_embeddings(22)
        trained = copy.deepcopy(base)
        with torch.no_grad():
            trained.get_input_embeddings().weight.normal_()
        lora = trained_lora(tmp_path, trained, **fields, modules_to_save=["lm_head"])
        lora.save_pretrained(tmp_path, save_embedding_layers=True)
    else:
        lora = trained_lora(tmp_path, copy.deepcopy(base), **fields, trainable_token_indices=[2, 5])
    model = load_lora(base.double(), tmp_path).eval()
    torch.testing.assert_close(model(INPUTS).logits, lora(INPUTS).logits, rtol=1e-12, atol=1e-13)
    small = LlamaForCausalLM(LlamaConfig(vocab_size=18, tie_word_embeddings=False, **sizes))
    if resized:
        with pytest.raises(ValueError, match=r"of shape \(22, 8\), but in the model .* is of \(18, 8\)"):
            load_lora(small, tmp_path)


def test_an_embedding_with_a_layer_tied_to_it(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=19, tie_word_embeddings=True, **sizes)).eval()
    lora = trained_lora(
        tmp_path, copy.deepcopy(base), target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    )
    model = load_lora(base.double(), tmp_path).eval()
    torch.testing.assert_close(model(INPUTS).logits, lora(INPUTS).logits, rtol=1e-12, atol=1e-13)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.get_base_layer().weight is head.get_base_layer().weight
    torch.testing.assert_close(head.get_delta_weight("default"), embedding.get_delta_weight("default"))
    load_lora(model, tmp_path, "again")  # beside an adapter that is tied already
    model.set_adapter("again")
    torch.testing.assert_close(model(INPUTS).logits, lora(INPUTS).logits, rtol=1e-12, atol=1e-13)


def rewrite_config(path: Path, **changes) -> None:
    fields = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**fields, **changes}))


def rewrite_weights(path: Path, change) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def refused(path: Path, match: str, model: nn.Module | None = None, error: type = ValueError, **fields) -> None:
    """Loading raises, in one sentence, and the model is as it was."""
    model = model or Model()
    modules = {name: type(module) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=match), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_lora(model, path, **fields)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"target_parameters": ["experts.down_proj"]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"monteclora_config": {"num_samples": 3}},
        {"layer_replication": [[0, 2]]},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {"beta": 1.0}},
        {"megatron_config": {"a": 1}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    ],
    ids=lambda changes: "-".join(map(str, next(iter(changes.items())))),
)
def test_loras_that_compute_something_else_are_refused(tmp_path, changes):
    trained_lora(tmp_path, Model())
    rewrite_config(tmp_path, **changes)
    name = next(iter(changes))
    refused(tmp_path, f"{name}=.*merge it by PEFT|scipy" if name == "init_lora_weights" else f"{name}=.*merge it by")


@pytest.mark.parametrize("how", [True, False, "gaussian", "eva", "orthogonal"])
def test_how_the_lora_began_does_not_matter(tmp_path, how):
    base = Model()
    lora = trained_lora(tmp_path, copy.deepcopy(base))
    rewrite_config(tmp_path, init_lora_weights=how, eva_config={"rho": 1.0} if how == "eva" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_lora(base.double(), tmp_path).eval()
    torch.testing.assert_close(model(INPUTS), lora(INPUTS), rtol=1e-12, atol=1e-13)


def test_what_is_left_out_is_named(tmp_path):
    base = Model()
    trained_lora(tmp_path, copy.deepcopy(base))
    rewrite_config(tmp_path, velora_config={"num_groups": 4})
    with pytest.warns(UserWarning, match="load_lora does not carry over velora_config="):
        load_lora(base.double(), tmp_path)


def lose(name: str):
    return lambda tensors: tensors.pop(f"base_model.model.{name}")


def put(name: str, *shape: int):
    return lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lose("up.lora_B.weight"), "lacks 'up.lora_B.weight'"),
        (lose("tokens.lora_embedding_A"), "lacks 'tokens.lora_embedding_A'"),
        (put("up.lora_A.weight", 4, 9), r"another base model: sizes .* 'up' \(there \(13, 9\), here \(13, 8\)\)"),
        (put("up.lora_A.weight", 5, 8), r"'up.lora_A.weight' of shape \(5, 8\).*asks for \(4, 8\)"),
        (put("conv.lora_A.weight", 4, 6, 2, 2), r"'conv' \(there \(4, 6, 2, 2\), here \(4, 6, 3, 3\)\)"),
        (put("conv.lora_B.weight", 4, 4), r"'conv.lora_B.weight' of shape \(4, 4\)"),
        (put("up.lora_magnitude_vector", 13), "holds 'up.lora_magnitude_vector'"),
        (put("up.lora_B.bias", 13), "holds 'up.lora_B.bias'"),
        (put("other.lora_A.weight", 4, 8), "another base model: it adapts 'other', which this model lacks"),
        (put("norm.lora_A.weight", 4, 4), "holds 'norm.lora_A.weight', of which its config says nothing"),
        (put("other.weight", 2), "the model has no 'other.weight'"),
        (lose("head.weight"), "lacks 'head.weight', which is part of what `modules_to_save`"),
        (lambda tensors: [lose(f"head.{part}")(tensors) for part in ("weight", "bias")], "lacks 'head', which"),
        (put("head.weight", 3, 5), r"'head.weight' of shape \(3, 5\), but in the model"),
        (put("up.lora_A.weight", 4, 0), r"'up' \(there \(13, 0\), here \(13, 8\)\)"),
        (lambda tensors: tensors["base_model.model.up.lora_A.weight"].fill_(torch.nan), "not finite"),
        (lambda tensors: tensors.update({"up.lora_A.weight": torch.ones(4, 8)}), "does not start with"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path, change, match):
    trained_lora(tmp_path, Model(), modules_to_save=["head"])
    rewrite_weights(tmp_path, change)
    refused(tmp_path, match)


@pytest.mark.parametrize(
    ("sizes", "target_modules", "match"),
    [
        (
            {"hidden_size": 24},
            ["q_proj"],
            r"sizes \(out, in\) differ in .*0.self_attn.q_proj' \(there \(16, 16\), here",
        ),
        ({"hidden_size": 24}, ["embed_tokens"], r"'model.embed_tokens' \(there \(16, 40\), here \(24, 40\)\)"),
        ({"num_hidden_layers": 1}, ["q_proj"], "it adapts 'model.layers.1.self_attn.q_proj', which this model lacks"),
        ({"num_hidden_layers": 1}, "all-linear", "it adapts 'model.layers.1.*and 4 more, which this model lacks"),
        ({"num_hidden_layers": 3}, ["q_proj"], r"lacks all of 'model.layers.2.self_attn.q_proj'.*another base model"),
    ],
)
def test_another_base_model_is_named_as_the_cause(tmp_path, sizes, target_modules, match):
    trained_lora(tmp_path, llama(), target_modules=target_modules)
    rewrite_config(tmp_path, base_model_name_or_path="the-base")
    refused(tmp_path, f"^The LoRA in .*{match}", llama(**sizes))
    refused(tmp_path, "another base model, 'the-base' by its config", llama(**sizes))


def test_another_architecture_is_named_as_the_cause(tmp_path):
    trained_lora(tmp_path, llama(), target_modules=["q_proj"])
    refused(tmp_path, "trained on another base model: it adapts 'model.layers.0.self_attn.q_proj'", Model())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "WARA"}, "not of a LoRA adapter"),
        ({"r": 0}, "r=0 of the LoRA in '.*' must be an int of at least 1"),
        ({"r": "4"}, "r='4' of the LoRA"),
        ({"rank_pattern": {"up": True}}, r"rank_pattern\['up'\]=True of the LoRA"),
        ({"rank_pattern": ["up"]}, "dicts were expected"),
        ({"lora_alpha": "x"}, "an alpha of 'x'"),
        ({"lora_alpha": 10**400}, "an alpha of 1000"),
        ({"r": 10**6}, "=1000000 must be an int from . to 65536"),
        ({"target_modules": 5}, "target_modules=5"),
        ({"alpha_pattern": {"up": float("inf")}}, "an alpha of inf"),
        ({"rank_pattern": {"(": 4}}, "not a valid regular expression"),
        ({"lora_dropout": 2}, "wara_dropout=2"),
    ],
)
def test_broken_configs_are_refused(tmp_path, changes, match):
    trained_lora(tmp_path, Model())
    rewrite_config(tmp_path, **changes)
    refused(tmp_path, match, error=(ValueError, TypeError))


def test_paths_that_are_no_lora(tmp_path):
    refused(tmp_path / "absent", "no adapter directory", error=FileNotFoundError)
    refused(tmp_path, "no file .*adapter_config.json", error=FileNotFoundError)
    trained_lora(tmp_path, Model())
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, "is a pickle", error=FileNotFoundError)
    (tmp_path / WEIGHTS).write_bytes(b"x" * 100)
    refused(tmp_path, "not a complete safetensors file")


@pytest.mark.parametrize(
    "convolution", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}], ids=lambda item: next(iter(item))
)
def test_convolutions_that_loras_compute_otherwise_are_refused(tmp_path, convolution):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
        trained_lora(tmp_path, Model(**convolution))
    refused(tmp_path, rf"The convolution 'conv' has .*{next(iter(convolution))}=.*PEFT's LoRA", Model(**convolution))


def test_another_model_is_refused(tmp_path):
    trained_lora(tmp_path, Model())
    wide = Model()
    wide.up, wide.proj = nn.Linear(8, 16), Conv1D(6, 16)
    refused(tmp_path, r"sizes \(out, in\) differ in 'up' \(there \(13, 8\), here \(16, 8\)\), 'proj' \(", wide)
    less = Model()
    less.up = nn.Identity()
    refused(tmp_path, "Target module up|'up", less, error=(TypeError, ValueError))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"form": "shared"}, "form='shared' cannot be given to load_lora"),
        ({"wara_alpha": 3}, "wara_alpha cannot be given"),
        ({"rank_pattern": {"up": 3}}, "rank_pattern cannot be given"),
        ({"subband_ranks": {"aa0": 3}}, "aa0 cannot be given"),
        ({"subband_ranks": {"xx1": 3}}, "names the subband 'xx1'"),
        ({"init_weights": False}, "init_weights=False"),
        ({"target_modules": ["up"]}, "holds '(conv|proj|tokens)"),
        ({"adapter_name": "level0"}, "adapter_name='level0'"),
    ],
)
def test_fields_that_are_the_loras_own_are_refused(tmp_path, fields, match):
    trained_lora(tmp_path, Model())
    refused(tmp_path, match, **fields)
