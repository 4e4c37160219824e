"""Rows about merging."""

from __future__ import annotations

import torch

from tests.models import WORDS, llama, mlp

from .models import adapted, add, close, layers_of, output
from .table import Area, Method

AREA = Area("Merging")
row = AREA.row


@row("`merge_and_unload`")
def merge(method: Method) -> str | None:
    model = adapted(method, llama())
    expected = output(model, WORDS)
    merged = model.merge_and_unload()
    assert not layers_of(merged, method) and type(merged) is type(llama())
    assert close(output(merged, WORDS), expected, 1e-4)


@row("`merge_and_unload(safe_merge=True)`")
def safe_merge(method: Method) -> str | None:
    model = adapted(method)
    expected = output(model)
    assert close(output(model.merge_and_unload(safe_merge=True)), expected)


@row("`safe_merge=True` of values that are not finite", *["refused: NaNs detected in the merged weights"] * 2)
def broken(method: Method) -> str | None:
    model = adapted(method)
    for name, value in model.named_parameters():
        if f"{method.prefix}_B" in name:
            value.data[0, 0] = float("nan")
    model.merge_and_unload(safe_merge=True)


@row(
    "modules before one that fails to merge",
    lora="differs: they stay merged",
)
def half_merged(method: Method) -> str | None:
    model = adapted(method)
    before = model.base_model.model.up.base_layer.weight.clone()
    next(value for name, value in model.named_parameters() if f".down.{method.prefix}_B" in name).data[0, 0] = (
        torch.nan
    )
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError:
        merged = not torch.equal(model.base_model.model.up.base_layer.weight, before)
        return "they stay merged" if merged else None
    raise AssertionError


@row("`merge_adapter`, `unmerge_adapter`")
def unmerge(method: Method) -> str | None:
    model = adapted(method)
    expected = output(model)
    model.merge_adapter()
    assert all(layer.merged for layer in layers_of(model, method).values())
    assert close(output(model), expected)
    model.unmerge_adapter()
    assert close(output(model), expected)
    assert close(model.base_model.model.up.base_layer.weight, mlp().up.weight)


@row("some of several adapters, by `adapter_names`")
def some(method: Method) -> str | None:
    model = adapted(method)
    add(model, method, "other", target_modules=["up"])
    model.set_adapter("other")
    expected = output(model)
    assert close(output(model.merge_and_unload(adapter_names=["other"])), expected)


@row("`unload`")
def unload(method: Method) -> str | None:
    model = adapted(method)
    output(model)
    assert torch.equal(output(model.unload()), output(mlp()))


@row(
    "an adapter on one of two layers that share a weight",
    lora="differs: the other layer changes too",
    wara="refused: Cannot merge into module 'lm_head': its weight is tied to 'model.embed_tokens'",
    instead="untie the layers first, or `ensure_weight_tying=True`",
)
def tied(method: Method) -> str | None:
    model = adapted(method, llama(tie_word_embeddings=True), target_modules=["lm_head"])
    expected = output(model, WORDS)
    return None if close(output(model.merge_and_unload(), WORDS), expected, 1e-4) else "the other layer changes too"


@row(
    "both tied layers adapted, with `ensure_weight_tying=True`",
    lora="differs: the adapter is added twice",
    inside="refused: its factors are tied to those of another module",
)
def tied_together(method: Method) -> str | None:
    model = adapted(method, llama(tie_word_embeddings=True), target_modules=["embed_tokens"], ensure_weight_tying=True)
    expected = output(model, WORDS)
    return None if close(output(model.merge_and_unload(), WORDS), expected, 1e-4) else "the adapter is added twice"


AREA.shown_in("models larger than memory, shard by shard: `wara-peft merge`", "tests/disk/test_merge.py")
