"""Models whose output layer is tied to their input embedding."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
)

from tests import models
from tests.models import bert, t5
from tests.references import Chain, module_shapes
from wara_peft import WaRAConfig, save_as_lora

TOKENS = torch.arange(1, 25).view(4, 6)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

FIELDS = (
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"], "wavelet": "db2", "levels": 2, "wara_alpha": 5},
    {"target_modules": r".*(embed_tokens|q_proj)", "form": "shared"},
)
each_config = pytest.mark.parametrize("fields", FIELDS, ids=["embedding", "head", "regex"])


def llama() -> nn.Module:
    return models.llama(num_hidden_layers=1, tie_word_embeddings=True).double()


def tied(fields: dict[str, object], **more) -> PeftModel:
    torch.manual_seed(1)
    config = WaRAConfig(ensure_weight_tying=True, init_weights=False, **fields, **more)
    return get_peft_model(llama(), config).eval()


def layers(model: PeftModel) -> tuple[nn.Module, nn.Module]:
    return model.base_model.model.get_submodule(EMBEDDING), model.base_model.model.get_submodule(HEAD)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@each_config
def test_both_layers_have_one_delta_and_one_set_of_parameters(fields):
    model = tied(fields)
    embedding, head = layers(model)
    torch.testing.assert_close(embedding.get_delta_weight("default"), head.get_delta_weight("default"))
    assert list(head.wara_A.parameters()) == list(head.wara_B.parameters()) == []
    assert set(module_shapes(model)) == {EMBEDDING, "model.layers.0.self_attn.q_proj"}
    name = head.wara_A["default"].subbands[-1]
    swapped = name[1] + name[0] + name[2:]
    assert torch.equal(head.wara_A["default"].subband(name), embedding.wara_B["default"].subband(swapped).T)

    dense = llama()
    dense.lm_head.weight.data += embedding.get_delta_weight("default")
    projection = model.base_model.model.model.layers[0].self_attn.q_proj
    dense.model.layers[0].self_attn.q_proj.weight.data += projection.get_delta_weight("default")
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-10, rtol=1e-10)


@each_config
def test_training_reaches_both(fields):
    model = tied(fields)
    embedding, head = layers(model)
    before = head.get_delta_weight("default").detach().clone()
    model(TOKENS).logits.square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.allclose(head.get_delta_weight("default"), before)
    torch.testing.assert_close(embedding.get_delta_weight("default"), head.get_delta_weight("default"))


@pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA")
@each_config
def test_saves_loads_and_exports(fields, tmp_path):
    model = tied(fields)
    model.save_pretrained(tmp_path / "wara", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "wara").eval()
    assert torch.equal(logits(loaded), logits(model))
    with pytest.warns(UserWarning, match="to merge, merge the WaRA adapter"):
        save_as_lora(tmp_path / "lora", model)
    lora = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(lora), logits(model), atol=1e-10, rtol=1e-10)
    assert lora.peft_config["default"].ensure_weight_tying


@each_config
def test_merging_keeps_the_tie(fields):
    model = tied(fields)
    expected = logits(model)
    weight = model.get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, weight)

    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = copy.deepcopy(model).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), expected, atol=1e-10, rtol=1e-10)


def test_deleting_and_adding_again():
    model = tied(FIELDS[0])
    first = logits(model)
    config = WaRAConfig(ensure_weight_tying=True, init_weights=False, target_modules=["embed_tokens"])
    model.add_adapter("other", config)
    model.set_adapter("other")
    embedding, head = layers(model)
    torch.testing.assert_close(embedding.get_delta_weight("other"), head.get_delta_weight("other"))
    assert not torch.allclose(logits(model), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert "other" not in head.tied_to
    assert torch.equal(logits(model), first)


def test_a_module_trained_in_full_stays_tied_as_in_lora(tmp_path):
    models = []
    for config_class in (WaRAConfig, LoraConfig):
        config = config_class(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
        models.append(get_peft_model(llama(), config).eval())
    for model in models:
        embedding, head = layers(model)
        assert head.modules_to_save["default"].weight is embedding.modules_to_save["default"].weight
    models[0].get_input_embeddings().weight.data.mul_(2.0)
    models[0].save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(models[0]))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_into_a_weight_that_another_layer_uses_unadapted_is_refused(target):
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True|tie_word_embeddings"):
        model = get_peft_model(llama(), WaRAConfig(target_modules=[target, "q_proj"], init_weights=False)).eval()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        other = {"embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[target]
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=rf"Cannot merge into module '.*{target}': .* tied to '{other}'"):
                merge()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        # The remedy of the message makes the two equal.
        expected = logits(model)
        module = model.base_model.model.get_submodule(other)
        module.weight = nn.Parameter(module.weight.detach().clone())
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-10, rtol=1e-10)


def test_a_tie_that_peft_does_not_see_is_refused_too():
    base = bert(BertForMaskedLM)
    fields = {"target_modules": ["word_embeddings"], "init_weights": False, "ensure_weight_tying": True}
    model = get_peft_model(base, WaRAConfig(**fields))
    with pytest.raises(ValueError, match=r"'bert.embeddings.word_embeddings': .*'cls.predictions.decoder'"):
        model.merge_and_unload()


TOKEN_FIELDS = {
    "head": ({"trainable_token_indices": {"lm_head": [1, 5]}}, "tokens of module 'lm_head'.*'model.embed_tokens'"),
    "others": (
        {"trainable_token_indices": {"lm_head": [1, 5], "embed_tokens": [2, 5]}},
        "tokens of module 'model.embed_tokens'.*'lm_head'",
    ),
    "beside an adapter of the embedding": (
        {"trainable_token_indices": {"lm_head": [1, 5]}, "target_modules": ["q_proj", "embed_tokens"]},
        "into module 'model.embed_tokens': its weight is tied to 'lm_head'",
    ),
    "beside an adapter of the head": (
        {"trainable_token_indices": {"embed_tokens": [1, 5]}, "target_modules": ["q_proj", "lm_head"]},
        "into module 'lm_head': its weight is computed from other tensors",
    ),
}


def with_tokens(base: nn.Module, **fields) -> PeftModel:
    model = get_peft_model(base, WaRAConfig(init_weights=False, **{"target_modules": ["q_proj"], **fields})).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.filterwarnings("ignore:.*`ensure_weight_tying` is not set to True", "ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("case", TOKEN_FIELDS)
def test_merging_tokens_into_a_weight_that_another_layer_uses_without_them_is_refused(case):
    fields, said = TOKEN_FIELDS[case]
    model = with_tokens(llama(), **fields)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"Cannot merge .*{said}"):
            merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if case != "beside an adapter of the head":
        # The remedy of the message makes the two equal.
        expected, embedding = logits(model), model.get_input_embeddings()
        while not isinstance(embedding, nn.Embedding):
            embedding = getattr(embedding, "token_adapter", embedding).base_layer
        embedding.weight = nn.Parameter(embedding.weight.detach().clone())
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("tokens", [[1, 5], {"embed_tokens": [1, 5]}, {"lm_head": [1, 5], "embed_tokens": [1, 5]}])
def test_tokens_that_peft_ties_merge(tokens):
    model = with_tokens(llama(), trainable_token_indices=tokens)
    expected = logits(model)
    before = model.get_input_embeddings().token_adapter.base_layer.weight.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.get_input_embeddings().token_adapter.base_layer.weight, before)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


def encoder_decoder(kind: str) -> nn.Module:
    if kind == "T5":
        return t5(num_layers=1)
    torch.manual_seed(0)
    layers = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SMALL.items()}
    config = BartConfig(vocab_size=40, d_model=16, scale_embedding=True, max_position_embeddings=64, **layers)
    return BartForConditionalGeneration(config).eval()


SMALL = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_embeddings_tied_to_an_embedding(kind, tmp_path):
    fields = {"ensure_weight_tying": True, "init_weights": False, "target_modules": ["embed_tokens"]}
    model = get_peft_model(encoder_decoder(kind), WaRAConfig(**fields)).eval()

    def outputs(of: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return of(input_ids=TOKENS, labels=TOKENS).logits

    embedding = model.get_input_embeddings()
    delta = embedding.get_delta_weight("default")
    dense = encoder_decoder(kind)
    assert not torch.allclose(outputs(model), outputs(dense), atol=1e-3)
    dense.get_input_embeddings().weight.data += delta  # of which all the others are ties
    torch.testing.assert_close(outputs(model), outputs(dense), atol=1e-4, rtol=1e-4)

    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(encoder_decoder(kind), tmp_path).eval()
    assert torch.equal(outputs(loaded), outputs(model))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert embedding.wara_A["default"].level1.grad.any()
    torch.testing.assert_close(outputs(model.merge_and_unload()), outputs(dense), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA")
@pytest.mark.parametrize(("kind", "name"), [("T5", "shared"), ("BART", "model.shared")])
def test_a_lora_of_an_embedding_that_peft_does_not_tie_is_to_be_merged(kind, name, tmp_path):
    """PEFT ties layers only to embeddings with names that it knows, which the warning says, and it is so."""
    config = WaRAConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, init_weights=False)
    model = get_peft_model(encoder_decoder(kind), config).eval()
    model.save_pretrained(tmp_path / "wara", save_embedding_layers=False)

    def outputs(of: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return of(input_ids=TOKENS, labels=TOKENS).logits

    for source in (model, tmp_path / "wara"):
        with pytest.warns(
            UserWarning, match=rf"input embedding '{name}' and layers .* ties no .* merge it before use"
        ):
            save_as_lora(tmp_path / "lora", source)
        with pytest.warns(UserWarning, match="You have requested `ensure_weight_tying`, but no tied modules"):
            lora = PeftModel.from_pretrained(encoder_decoder(kind), tmp_path / "lora").eval()
        assert not torch.allclose(outputs(lora), outputs(model), atol=1e-2)
        torch.testing.assert_close(outputs(lora.merge_and_unload()), outputs(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 100}]
)  # more than ΔW's rank: exact
@pytest.mark.parametrize("order", [["default", "plain"], ["plain", "default"]])
def test_combining_keeps_the_tie(order, fields):
    model = tied(FIELDS[0])
    model.add_adapter("plain", WaRAConfig(target_modules=["q_proj"], init_weights=False))
    model.base_model.set_adapter(["default", "plain"])
    expected = logits(model)
    model.add_weighted_adapter(order, [1.0, 1.0], "both", **fields)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("combination_type", ["cat", "svd"])
@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_combining_keeps_the_tie_of_embeddings(kind, combination_type, tmp_path):
    config = WaRAConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, init_weights=False, r=2)
    model = get_peft_model(encoder_decoder(kind), config).eval()
    model.add_adapter("other", copy.deepcopy(config))
    embedding, dense = model.get_input_embeddings(), encoder_decoder(kind)
    for name, weight in (("default", 0.7), ("other", -1.5)):
        dense.get_input_embeddings().weight.data += weight * embedding.get_delta_weight(name)
    model.add_weighted_adapter(["default", "other"], [0.7, -1.5], "both", combination_type, svd_rank=16)
    model.set_adapter("both")

    def outputs(of: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return of(input_ids=TOKENS, labels=TOKENS).logits

    torch.testing.assert_close(outputs(model), outputs(dense), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["both"], save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(encoder_decoder(kind), tmp_path / "both").eval()
    torch.testing.assert_close(outputs(loaded), outputs(dense), atol=1e-4, rtol=1e-4)


def test_combining_tied_with_untied_is_refused():
    model = tied(FIELDS[0])
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        model.add_adapter("head", WaRAConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="'lm_head' some of the adapters default, head are tied"):
        model.add_weighted_adapter(["default", "head"], [1.0, 1.0], "both")


class TestOneModuleInTwoPlaces:
    """The adapter is in the first place only, as PEFT's are, so merging would change what the second computes."""

    @staticmethod
    def model() -> nn.Module:
        torch.manual_seed(0)
        model = Chain(depth=3)
        model.layers[2] = model.layers[0]
        config = WaRAConfig(target_modules=["layers.0", "layers.1"], init_weights=False)
        return get_peft_model(model, config)

    def test_merging_is_refused_before_anything_is_changed(self):
        model = self.model()
        x = torch.randn(4, 8)
        before = model(x)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match=r"Cannot merge into module '.*layers\.0': .* tied to '.*layers\.2'"):
                merge()
        assert torch.equal(model(x), before)

    def test_the_adapter_in_both_places_merges(self):
        model = self.model()
        layers = model.base_model.model.layers
        layers[2] = layers[0]
        x = torch.randn(4, 8)
        expected = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)
