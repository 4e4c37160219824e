"""Factorised layers in a checkpoint: known by the names and shapes of their tensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from .dictionary_linear import DictionaryLinear
from .low_rank_linear import LowRankLinear, linear_shape

FACTORIZED = (LowRankLinear, DictionaryLinear)


def put_in_place(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Replace linear layers, in place, by the factorised ones that a checkpoint has in their stead.

    Args:
        model: a model without values (their devices and dtypes are those of the default).
        shapes: of each of the checkpoint's tensors by key. The prefix of a model's base may be there or not.

    Returns:
        Names of the layers replaced.

    Raises:
        ValueError: the shapes of factors do not fit the layer or each other, or the layer is there dense too.
    """
    prefix = getattr(model, "base_model_prefix", "")
    replaced = []
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, (nn.Linear, Conv1D)):
            continue
        for key in dict.fromkeys((name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")):
            factorised = _of(key, layer, shapes)
            if factorised is not None:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, factorised.train(layer.training))
                replaced.append(name)
                break
    return replaced


def describe(model: nn.Module) -> dict[str, dict[str, object]]:
    """Kind and sizes of each factorised layer of a model, by name."""
    found: dict[str, dict[str, object]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LowRankLinear):
            found[name] = {"kind": "LowRankLinear", "rank": layer.rank}
        elif isinstance(layer, DictionaryLinear):
            found[name] = {"kind": "DictionaryLinear", "atoms": layer.atoms, "nonzeros": layer.nonzeros}
    return found


def _of(
    key: str, layer: nn.Linear | Conv1D, shapes: Mapping[str, tuple[int, ...]]
) -> LowRankLinear | DictionaryLinear | None:
    down = shapes.get(f"{key}.down.weight")
    is_low_rank, is_dictionary = f"{key}.up.weight" in shapes, f"{key}.values" in shapes
    if down is None or not (is_low_rank or is_dictionary):
        return None
    if f"{key}.weight" in shapes or (is_low_rank and is_dictionary):
        raise ValueError(f"{key!r} has factors of several kinds in the checkpoint, or a dense weight beside them.")
    n, m = linear_shape(layer)
    inner = down[0] if down else 0
    expected: dict[str, tuple[int, ...]] = {f"{key}.down.weight": (inner, n)}
    if is_low_rank:
        bias = f"{key}.up.bias"
        expected[f"{key}.up.weight"] = (m, inner)
    else:
        bias = f"{key}.bias"
        nonzeros = shapes[f"{key}.values"][-1] if shapes[f"{key}.values"] else 0
        expected |= {f"{key}.values": (m, nonzeros), f"{key}.support": (m, math.ceil(inner / 8))}
    if bias in shapes:
        expected[bias] = (m,)
    for part, shape in expected.items():
        if shapes.get(part) != shape:
            raise ValueError(
                f"The checkpoint has {part!r} of shape {shapes.get(part)}, where a layer of {n} inputs and {m} "
                f"outputs with the other factors of {key!r} needs {shape}."
            )
    if is_low_rank:
        return LowRankLinear(n, m, inner, bias=bias in shapes)
    return DictionaryLinear(n, m, inner, nonzeros, bias=bias in shapes)
