"""The cache beside a full one and beside projected weights, what it takes, and models that it is not for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tests.compression.models import batches, llama
from tests.models import gpt2
from wara_peft.compression import LowRankCache, cache_bases, calibrate, factorize
from wara_peft.compression.budget.depth import depth_shares

IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def opt() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=32,
        max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def calibrated(model: nn.Module) -> dict:
    return calibrate(model, batches(6, labelled=False), target_modules=["k_proj", "v_proj"], show_progress_bar=False)


@pytest.mark.parametrize("make", [llama, opt])
@torch.no_grad()
def test_full_rank_is_a_full_cache(make) -> None:
    model = make().double()
    bases = cache_bases(model, 4, calibrated(model), keys=make is opt)
    expected, found = model(IDS, past_key_values=DynamicCache()), model(IDS, past_key_values=LowRankCache(bases))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-10)
    for token in (5, 7):
        ids = torch.tensor([[token], [token + 1]])
        expected = model(ids, past_key_values=expected.past_key_values)
        found = model(ids, past_key_values=found.past_key_values)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("with_statistics", [True, False])
@torch.no_grad()
def test_is_what_projected_weights_compute(with_statistics: bool) -> None:
    """E Eᵀ (W x + b − c) + c is a linear layer of its own, by NumPy's SVD of W S for its directions."""
    model = opt().double()
    statistics = calibrated(model) if with_statistics else None
    bases = cache_bases(model, 2, statistics, keys=True)
    reference = copy.deepcopy(model)
    for index, layer in enumerate(reference.model.decoder.layers):
        for part, heads in (("k_proj", bases[index].keys), ("v_proj", bases[index].values)):
            linear = getattr(layer.self_attn, part)
            root, mean = torch.eye(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
            if statistics is not None:
                entry = statistics[f"model.decoder.layers.{index}.self_attn.{part}"]
                mean = entry.mean.double()
                values, vectors = torch.linalg.eigh(entry.moment.double() - torch.outer(mean, mean))
                root = vectors * values.clamp(min=0).sqrt()
            for head in range(4):
                rows = slice(4 * head, 4 * head + 4)
                weight = linear.weight[rows]
                left, values, _ = torch.linalg.svd(weight @ root)
                projector = left[:, :2] @ left[:, :2].T
                centre = weight @ mean + linear.bias[rows]
                torch.testing.assert_close(heads.basis[head] @ heads.basis[head].T, projector)
                lost = ((weight - projector @ weight) @ root).square().sum()
                torch.testing.assert_close(lost, values[2:].square().sum())
                linear.bias[rows] = projector @ (linear.bias[rows] - centre) + centre
                linear.weight[rows] = projector @ weight
    cache = LowRankCache(bases)
    found = model(IDS, past_key_values=cache)
    torch.testing.assert_close(found.logits, reference(IDS).logits, rtol=0, atol=1e-10)
    assert (found.logits - model(IDS).logits).abs().max() > 1e-6
    ids = torch.cat((IDS, torch.full((2, 1), 7)), 1)
    further = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(further[:, 0], reference(ids).logits[:, -1], rtol=0, atol=1e-10)


@torch.no_grad()
def test_bytes_and_generation() -> None:
    model = llama()  # 2 layers, 2 key-value heads of width 4
    caches = {1: LowRankCache(cache_bases(model, 1)), 4: DynamicCache()}
    for rank, cache in caches.items():
        model.generate(IDS, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)
        length = 9 + 3
        assert cache.get_seq_length() == length
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert kept == 4 * 2 * 2 * 2 * length * (4 + rank)
    cache = LowRankCache(cache_bases(model, 2))
    found = model.generate(IDS, past_key_values=cache, num_beams=2, max_new_tokens=4, do_sample=False)
    assert found.shape[0] == 2


def test_ranks_by_depth() -> None:
    model = llama()
    names = {f"v{i}.{i}.": model.model.layers[i].self_attn.v_proj for i in (0, 1)}
    shares = depth_shares(names)
    assert shares == [1.0, 0.5]
    assert [layer.values.rank for layer in cache_bases(model, 4, by_depth=True)] == [4, 2]


def test_grouped_queries_share_a_basis_and_low_rank_projections_work() -> None:
    model = llama()
    before = cache_bases(model, 3)
    assert before[0].values.basis.shape == (2, 4, 3) and before[0].keys is None
    factorize(model, 4, target_modules=["v_proj"])
    with torch.no_grad():
        found = model(IDS, past_key_values=LowRankCache(cache_bases(model, 4))).logits
        torch.testing.assert_close(found, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_bfloat16() -> None:
    model = llama().bfloat16()
    cache = LowRankCache(cache_bases(model, 2))
    with torch.no_grad():
        assert model(IDS, past_key_values=cache).logits.dtype == torch.bfloat16
    assert cache.layers[0].values.dtype == torch.bfloat16


def broken() -> nn.Module:
    model = llama()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.inf
    return model


def mistral() -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, sliding_window=4, head_dim=4,
    )  # fmt: skip
    return MistralForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (llama, {"rank": 2, "keys": True}, "keys of LlamaForCausalLM are turned by rotary"),
        (llama, {"rank": 5}, "rank=5 for heads of width 4 must be an int from 1 to 4"),
        (llama, {"rank": 2, "statistics": {}}, r"no inputs of 'model\.layers\.0\.self_attn\.v_proj'"),
        (broken, {"rank": 2}, r"'model\.layers\.1\.self_attn\.v_proj' cannot be factorised: its weight holds NaN"),
        (broken, {"rank": 2, "by_depth": True}, r"'model\.layers\.1\.self_attn\.v_proj' cannot be .* NaN"),
        (gpt2, {"rank": 2}, "GPT2LMHeadModel has 0 attentions with 'v_proj'"),
        (mistral, {"rank": 2}, "MistralForCausalLM has layers of kinds .'sliding_attention'"),
    ],
)
def test_is_refused(make, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_bases(make(), **fields)
