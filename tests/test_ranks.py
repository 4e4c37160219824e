"""All public functions refuse a rank that is no int of its range, by its name and value, before they do anything."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import wara_peft
from tests.compression.models import llama
from wara_peft import WaRAConfig, compression
from wara_peft.arguments import check_whole_number
from wara_peft.attention import LinformerAttention, LowRankMultiheadAttention
from wara_peft.lora.export import lora_error
from wara_peft.lora.load import load_lora


def layers() -> nn.ModuleDict:
    return nn.ModuleDict({"q": nn.Linear(8, 8)})


def adapted() -> nn.Module:
    return get_peft_model(layers(), WaRAConfig(r=1, target_modules=["q"]))


def allocated(**ranks):
    config, data = WaRAConfig(r=2, target_modules=["q"]), [torch.ones(1, 8)]
    wara_peft.allocate_ranks(layers(), config, data, budget=64, loss_fn=lambda of, x: of["q"](x).sum(), **ranks)


def lora_loaded(path, value):
    get_peft_model(layers(), LoraConfig(r=2, target_modules=["q"])).save_pretrained(path)
    load_lora(layers(), path, r=value)


def combined(value):
    adapted().base_model.add_weighted_adapter(["default"], [1.0], "new", "ties", density=0.5, svd_rank=value)


def cut(value):
    model = layers()
    compression.ordered_low_rank(model, 4, ["q"])
    model["q"].cut(value)


CALLS = {
    "WaRAConfig, r": lambda value: WaRAConfig(r=value),
    "WaRAConfig, levels": lambda value: WaRAConfig(levels=value),
    "WaRAConfig, rank_pattern": lambda value: WaRAConfig(rank_pattern={"q": value}),
    "WaRAConfig, rank_pattern of a subband": lambda value: WaRAConfig(rank_pattern={"q": {"aa1": value}}),
    "WaRAConfig, subband_ranks": lambda value: WaRAConfig(subband_ranks={"aa1": value}),
    "from_lora, levels": lambda value: WaRAConfig.from_lora(LoraConfig(), levels=value),
    "to_lora, rank": lambda value: wara_peft.to_lora(adapted(), value),
    "lora_error, rank": lambda value: lora_error(adapted(), value),
    "save_as_lora, rank": lambda value: wara_peft.save_as_lora("nowhere", adapted(), value),
    "add_weighted_adapter, svd_rank": combined,
    "allocate_ranks, min_rank": lambda value: allocated(min_rank=value),
    "allocate_ranks, max_rank": lambda value: allocated(max_rank={"q": value}),
    "factorize, rank": lambda value: compression.factorize(layers(), value),
    "factorize_linear, rank": lambda value: compression.factorize_linear(nn.Linear(8, 8), value),
    "factorize_conv, rank": lambda value: compression.factorize_conv(nn.Conv2d(8, 8, 3), value),
    "ordered_low_rank, rank": lambda value: compression.ordered_low_rank(layers(), value, ["q"]),
    "low_rank_plus_sparse, rank": lambda value: compression.low_rank_plus_sparse(layers(), value, 0.1, ["q"]),
    "compress, rank": lambda value: compression.compress(
        layers(), compression.SVD({"q": value}, target_modules=["q"])
    ),
    "truncate, rank": lambda value: compression.truncate(nn.Sequential(compression.LowRankLinear(8, 8, 4)), value),
    "cut, rank": cut,
    "cache_bases, rank": lambda value: compression.cache_bases(llama(), value),
    "LowRankLinear, rank": lambda value: compression.LowRankLinear(8, 8, value),
    "LowRankConv, rank": lambda value: compression.LowRankConv(nn.Conv2d(8, 8, 3), value),
    "LowRankPlusSparseLinear, rank": lambda value: compression.LowRankPlusSparseLinear(8, 8, value, 2),
    "LowRankPlusSparseLinear, nonzeros": lambda value: compression.LowRankPlusSparseLinear(8, 8, 1, value),
    "DictionaryLinear, atoms": lambda value: compression.DictionaryLinear(8, 8, value, 2),
    "DictionaryLinear, nonzeros": lambda value: compression.DictionaryLinear(8, 8, 4, value),
    "LowRankTextHead, rank": lambda value: compression.LowRankTextHead(torch.randn(5, 8), value),
    "LowRankMultiheadAttention, rank": lambda value: LowRankMultiheadAttention(8, 2, value),
    "LinformerAttention, k": lambda value: LinformerAttention(8, 2, 16, value),
}
ZERO_IS_A_RANK = {"subband_ranks", "min_rank", "max_rank", "rank_pattern of a subband"}


@pytest.mark.parametrize("value", [True, 2.0, "2", 0, -1], ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_rank_is_refused(call, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = call.partition(", ")[2]
    if value is not True and value == 0 and name in ZERO_IS_A_RANK:
        return
    with pytest.raises((TypeError, ValueError)) as raised:
        CALLS[call](value)
    said = str(raised.value)
    assert name.split()[0] in said and re.search(rf"{re.escape(repr(value))}(?![\d.])", said), said
    assert isinstance(raised.value, TypeError if isinstance(value, (bool, str)) else (TypeError, ValueError))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [True, 2.0, "2", 0, -1], ids=repr)
def test_of_load_lora(value, tmp_path):
    with pytest.raises((TypeError, ValueError), match=rf"r={re.escape(repr(value))} must be an int"):
        lora_loaded(tmp_path, value)


def test_the_bounds_are_allowed():
    for value in (1, 4):
        check_whole_number("rank", value, most=4)
    check_whole_number("rank", 0, least=0)
    check_whole_number("rank", 10**400)
    for share in (1e-300, 1.0):
        check_whole_number("rank", share, fraction="the share")
    for wrong in (5, 0):
        with pytest.raises(ValueError, match=f"^rank={wrong} of 'q' must be an int from 1 to 4\\.$"):
            check_whole_number("rank", wrong, most=4, of=" of 'q'")
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"^rank={wrong} must be an int .* a float in \(0, 1\]: the share\.$"):
            check_whole_number("rank", wrong, fraction="the share")
