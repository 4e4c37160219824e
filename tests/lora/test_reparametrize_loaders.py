"""Loaders that swap or add LoRA beside a reparametrised one: PEFT's, transformers' and diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from tests.diffusion_models import unet
from tests.injection.test_weight_tying import TOKENS, llama
from tests.lora.test_reparametrize import KINDS, fill, lora, output
from tests.lora.test_reparametrize_writers import plain, swap, weights
from wara_peft import reparametrize_lora
from wara_peft.lora.reparametrized_layers import ReparametrizedLayer


@pytest.mark.filterwarnings("ignore:levels=. is more than is useful")
@pytest.mark.parametrize("settings", [{}, {"wavelet": "db2", "levels": 2}], ids=["haar", "db2, two levels"])
@pytest.mark.parametrize("kind", KINDS)
def test_hotswap_of_each_kind_of_layer(kind, settings, tmp_path):
    models = []
    for seed in (0, 1):
        model, inputs = lora(kind, r=14)
        reparametrize_lora(model, **settings)
        torch.manual_seed(seed)
        fill(model)
        models.append(model)
    model, other = models
    twin, before = plain(model), output(model, inputs)
    other.save_pretrained(tmp_path)
    for one in (model, twin):
        swap(one, str(tmp_path))
    assert not torch.allclose(output(model, inputs), before, atol=1e-6)
    torch.testing.assert_close(output(model, inputs), output(twin, inputs), atol=1e-10, rtol=1e-10)
    assert torch.equal(output(twin, inputs), output(plain(other), inputs))


# transformers


def transformers_model(seed: int = 0, **fields: Any) -> Any:
    model = llama()
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(**{"r": 8, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def transformers_reparametrised(seed: int = 0, **fields: Any) -> Any:
    model = transformers_model(seed, **fields)
    reparametrize_lora(model, project=True)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits


def test_hotswap_of_transformers(tmp_path):
    model = transformers_reparametrised()
    twin, before = plain(model), logits(model)
    transformers_reparametrised(1).save_pretrained(tmp_path)
    for one in (model, twin):
        one.load_adapter(tmp_path, adapter_name="default", hotswap=True)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(logits(model), logits(transformers_reparametrised(1)), atol=1e-5, rtol=1e-5)
    assert any(isinstance(module, ReparametrizedLayer) for module in model.modules())


@pytest.mark.parametrize("outside", [0, -1], ids=["first", "last"])
def test_hotswap_of_transformers_outside_of_the_span(outside, tmp_path):
    model, new = transformers_reparametrised(), plain(transformers_reparametrised(1))
    with torch.no_grad():
        weights(new)[outside].normal_()
    new.save_pretrained(tmp_path)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="span"):
        model.load_adapter(peft_model_id=tmp_path, adapter_name="default", hotswap=True)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_transformers_loads_another_adapter_beside(tmp_path):
    model = transformers_reparametrised()
    before = logits(model)
    transformers_model(1, r=5).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="other")
    torch.testing.assert_close(logits(model), logits(transformers_model(1, r=5)), atol=1e-5, rtol=1e-5)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


# diffusers


def pictures(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 16, generator=generator)
    with torch.no_grad():
        return model(sample.double(), 3, states.double()).sample


def from_file(path: Path) -> dict[str, Tensor]:
    return load_file(path / "pytorch_lora_weights.safetensors")


def diffusers_model(seed: int = 0, **fields: Any) -> Any:
    model = unet().double()
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": ["to_q", "conv1"], **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    reparametrize_lora(model, project=True)
    return model


@pytest.mark.filterwarnings("ignore:levels=. is more than is useful")
def test_diffusers_hotswap_and_loading_beside(tmp_path):
    model = diffusers_model()
    twin, before = plain(model), pictures(model)
    diffusers_model(1).save_lora_adapter(tmp_path, "default")
    for one in (model, twin):
        one.load_lora_adapter(from_file(tmp_path), adapter_name="default", hotswap=True, prefix=None)
    assert not torch.allclose(pictures(model), before, atol=1e-3)
    torch.testing.assert_close(pictures(model), pictures(twin), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(pictures(model), pictures(diffusers_model(1)), atol=1e-4, rtol=1e-4)
    diffusers_model(2).save_lora_adapter(tmp_path, "default")
    for one in (model, twin):
        one.load_lora_adapter(from_file(tmp_path), adapter_name="beside", prefix=None)
        one.set_adapters(["default", "beside"], [0.7, -1.3])
    torch.testing.assert_close(pictures(model), pictures(twin), atol=1e-10, rtol=1e-10)
    for one in (model, twin):
        one.fuse_lora()
    torch.testing.assert_close(pictures(model), pictures(twin), atol=1e-10, rtol=1e-10)


def test_diffusers_keeps_the_adapter_when_a_hotswap_is_refused(tmp_path):
    model = diffusers_model()
    before = pictures(model)
    new = plain(diffusers_model(1))
    with torch.no_grad():
        weights(new)[-1].normal_()
    new.save_lora_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match="span"):
        model.load_lora_adapter(from_file(tmp_path), adapter_name="default", hotswap=True, prefix=None)
    assert torch.equal(pictures(model), before)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_lora_that_peft_ties_to_an_embedding_stays_plain(project):
    """PEFT gives both layers parameters of their own in the same memory, so that what trains one trains the other."""
    config = LoraConfig(r=8, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(llama(), config)
    report = reparametrize_lora(model, project=project)
    assert [module.name.rpartition(".")[2] for module in report.modules] == ["q_proj"]
    assert "tied" in report.left["base_model.model.lm_head"]
    embedding = model.base_model.model.model.embed_tokens.lora_embedding_B["default"]
    with torch.no_grad():
        embedding.mul_(3)
    assert torch.equal(model.base_model.model.lm_head.lora_A["default"].weight, embedding.T)
