"""Models whose output layer is tied to their input embedding."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

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
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


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
    assert set(model.peft_config["default"].module_shapes) == {EMBEDDING, "model.layers.0.self_attn.q_proj"}
    name = head.wara_A["default"].subbands[-1]
    swapped = name[1] + name[0] + name[2:]
    assert torch.equal(head.wara_A["default"].subband(name), embedding.wara_B["default"].subband(swapped).T)

    dense = llama()
    dense.lm_head.weight.data += embedding.get_delta_weight("default")
    projection = model.base_model.model.model.layers[0].self_attn.q_proj
    dense.model.layers[0].self_attn.q_proj.weight.data += projection.get_delta_weight("default")
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)


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
    torch.testing.assert_close(logits(lora), logits(model), atol=1e-5, rtol=1e-5)
    assert lora.peft_config["default"].ensure_weight_tying


@each_config
def test_merging_keeps_the_tie(fields):
    model = tied(fields)
    expected = logits(model)
    weight = model.get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model.get_input_embeddings().weight, weight, atol=1e-6, rtol=1e-6)

    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = copy.deepcopy(model).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_deleting_and_adding_again():
    model = tied(FIELDS[0])
    first = logits(model)
    config = WaRAConfig(ensure_weight_tying=True, init_weights=False, target_modules=["embed_tokens"])
    model.add_adapter("other", config)
    model.set_adapter("other")
    embedding, head = layers(model)
    assert torch.equal(embedding.get_delta_weight("other"), head.get_delta_weight("other"))
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


def test_without_ensure_weight_tying_a_warning_says_what_may_go_wrong():
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        model = get_peft_model(llama(), WaRAConfig(target_modules=["embed_tokens"], init_weights=False))
    with pytest.warns(UserWarning, match="This can lead to complications"):
        model.merge_adapter()


@pytest.mark.parametrize("order", [["default", "plain"], ["plain", "default"]])
def test_combining_keeps_the_tie(order):
    model = tied(FIELDS[0])
    model.add_adapter("plain", WaRAConfig(target_modules=["q_proj"], init_weights=False))
    model.base_model.set_adapter(["default", "plain"])
    expected = logits(model)
    model.add_weighted_adapter(order, [1.0, 1.0], "both")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_combining_tied_with_untied_is_refused():
    model = tied(FIELDS[0])
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        model.add_adapter("head", WaRAConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="'lm_head' some of the adapters default, head are tied"):
        model.add_weighted_adapter(["default", "head"], [1.0, 1.0], "both")
