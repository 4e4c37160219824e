"""WaRA beside embeddings against PyWavelets' ΔW and PEFT's LoRA."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.references import WAVELETS, dense_coefficients, inverse_transform, sizes
from wara_peft import WaRAConfig
from wara_peft.layers.embedding import Embedding

TOKENS = torch.tensor([[0, 3, 12, 12], [5, 6, 11, 1]])


class ScaledEmbedding(nn.Embedding):
    """Scales what it looks up, as Gemma's embedding does."""

    embed_scale = 3.0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.embed_scale


class Bag(nn.Module):
    def __init__(self, embedding: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = embedding or nn.Embedding(13, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


def adapted(base: nn.Module, **fields) -> Embedding:
    return Embedding(base, "default", "tokens", WaRAConfig(**{"init_weights": False, **fields})).double()


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_equals_pywavelets(wavelet, levels):
    layer = adapted(nn.Embedding(13, 6), wavelet=wavelet, levels=levels, subband_ranks={"aa0": 2}, wara_alpha=3)
    expected = (
        3 / layer.total_rank("default") * inverse_transform(dense_coefficients(layer), wavelet, (6, 13), levels).T
    )
    np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), expected, atol=1e-12)
    found = layer(TOKENS)
    torch.testing.assert_close(
        found, (layer.base_layer.weight + torch.from_numpy(expected))[TOKENS], atol=1e-12, rtol=0
    )
    layer.merge()
    torch.testing.assert_close(layer(TOKENS), found, atol=1e-12, rtol=0)


@pytest.mark.parametrize("fields", [{"form": "shared", "wavelet": "db2"}, {"subband_ranks": {"aa1": 0, "ad1": 0}}])
def test_other_layouts(fields):
    layer = adapted(nn.Embedding(13, 6), **fields)
    expected = (layer.base_layer.weight + layer.get_delta_weight("default"))[TOKENS]
    torch.testing.assert_close(layer(TOKENS), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_gradients_equal_those_of_the_dense_delta(wavelet):
    layer = adapted(nn.Embedding(13, 6), wavelet=wavelet, levels=2)
    parameters = [p for name, p in layer.named_parameters() if "wara" in name]
    weight = torch.randn(2, 4, 6, dtype=torch.float64)
    found = torch.autograd.grad(layer(TOKENS), parameters, weight)
    expected = torch.autograd.grad(layer.get_delta_weight("default")[TOKENS], parameters, weight)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_initialisation_is_that_of_lora():
    layer = Embedding(nn.Embedding(13, 64), "default", "tokens", WaRAConfig(r=32))
    assert all(parameter.eq(0).all() for parameter in layer.wara_A["default"].parameters())
    assert layer.wara_B["default"].level1.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(layer(TOKENS), layer.base_layer(TOKENS))


def test_scaled_embeddings():
    layer = adapted(ScaledEmbedding(13, 6))
    expected = 3.0 * (layer.base_layer.weight + layer.get_delta_weight("default"))[TOKENS]
    torch.testing.assert_close(layer(TOKENS), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("counts", [(1, 1, 1), (4, 2, 1)])
def test_gradients_by_frequency_are_those_of_lora(counts):
    """LoRA hands the flag to the embedding of its own factor; rank 8 of the undecomposed matrix is such a LoRA."""
    tokens = torch.tensor([token for token, count in zip((3, 5, 11), counts, strict=True) for _ in range(count)])
    ranks = {"aa0": 8, "aa1": 0, "ad1": 0, "da1": 0, "dd1": 0}
    weight = torch.randn(len(tokens), 6, dtype=torch.float64)
    gradients = {}
    for by_frequency in (False, True):
        base = Bag(nn.Embedding(13, 6, scale_grad_by_freq=by_frequency)).double()
        config = LoraConfig(r=8, target_modules=["embedding"])
        lora = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).base_model.model.embedding
        ours = adapted(base.embedding, subband_ranks=ranks)
        own = [ours.wara_A["default"].level0, ours.wara_B["default"].level0]
        others = [lora.lora_embedding_A["default"], lora.lora_embedding_B["default"]]
        torch.manual_seed(0)
        for mine, other in zip(own, others, strict=True):
            mine.data.normal_()
            other.data.copy_(mine.data)
        torch.testing.assert_close(ours(tokens), lora(tokens), atol=1e-12, rtol=0)
        found, expected = (
            torch.autograd.grad(layer(tokens), factors, weight) for layer, factors in ((ours, own), (lora, others))
        )
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        gradients[by_frequency] = found[0]
    assert torch.allclose(gradients[True], gradients[False]) is (max(counts) == 1)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_gradients_by_frequency_are_those_of_the_dense_delta(wavelet):
    layer = adapted(nn.Embedding(13, 6, scale_grad_by_freq=True), wavelet=wavelet, levels=2)
    parameters = list(layer.wara_A["default"].parameters())
    weight = torch.randn(2, 4, 6, dtype=torch.float64)
    found = torch.autograd.grad(layer(TOKENS), parameters, weight)
    dense = layer.get_delta_weight("default")
    expected = torch.autograd.grad(F.embedding(TOKENS, dense, scale_grad_by_freq=True), parameters, weight)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_vocabulary_axis_is_never_synthesised():
    vocabulary = 5000
    layer = adapted(nn.Embedding(vocabulary, 8), wavelet="db2", levels=2).requires_grad_(True)
    coefficients = sizes(vocabulary, 2)
    widest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal widest
            result = func(*args, **(kwargs or {}))
            widest = max([widest, *(result.shape if isinstance(result, torch.Tensor) else ())])
            return result

    with Recorder():
        layer.wara_A["default"](TOKENS.flatten())
    # Never as wide as the vocabulary, nor as the coefficients of a level.
    assert 0 < widest < min(coefficients)


@pytest.mark.filterwarnings("ignore:The saved adapter was made")
def test_a_resized_vocabulary_is_refused_on_load(tmp_path):
    get_peft_model(Bag(), WaRAConfig(target_modules=["embedding"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'embedding' \(saved \(6, 13\), here \(6, 15\)\).*resized"):
        PeftModel.from_pretrained(Bag(nn.Embedding(15, 6)), tmp_path)
