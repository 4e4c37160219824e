"""Combines adapters in the ways that PEFT has for LoRA: PEFT's functions do it, on the adapters as exact LoRAs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from ..layers.as_lora import LoraModule
from ..layers.base import WaRALayer
from ..messages import first_few

Weighted = Sequence[tuple[LoraModule, float]]
"""The LoRAs of one module, each with its weight."""

OF_FACTORS: Mapping[str, Callable[..., Tensor]] = {
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
"""Types that combine all Â, and separately all B̂. All adapters need the same rank, which the result has too."""
OF_DELTA_WEIGHTS: Mapping[str, Callable[..., Tensor]] = {
    "svd": task_arithmetic,
    "ties_svd": ties,
    "dare_linear_svd": dare_linear,
    "dare_ties_svd": dare_ties,
    "magnitude_prune_svd": magnitude_prune,
}
"""Types that combine all ΔW of a module, and reduce the result to a rank by SVD."""


@torch.no_grad()
def combine_as_lora(
    layers: Mapping[str, WaRALayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    options: Mapping[str, Any],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Give what `LoraModel.add_weighted_adapter` makes of the adapters as exact LoRAs.

    Args:
        layers: the adapted layers by name, in the order of the model.
        adapters, weights, combination_type, options: as in `WaRAModel.add_weighted_adapter`.

    Returns:
        For each module A, (rank, n, *kernel) or (rank, n · kernel), and B, (m, rank). The update is B A.

    Raises:
        ValueError: the type takes no convolutions with groups or no unequal ranks, or it needs a density and gets
            none; or an adapter has no ΔW, or one that is not finite.
    """
    if combination_type != "svd" and options["density"] is None:
        raise ValueError(
            f"combination_type={combination_type!r} needs `density`, the share of values that it keeps, in [0, 1]."
        )
    ranks = _ranks(layers, adapters)
    rank = max(ranks.values())
    if combination_type in OF_FACTORS:
        _check_factors(layers, ranks, combination_type)
    combine = _function(combination_type, options)
    result = {}
    for name, layer in layers.items():
        own = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if adapter in layer.wara_A]
        weighted = [(_exported(name, layer, adapter), weight) for adapter, weight in own]
        if combination_type in OF_FACTORS:
            result[name] = _combined_factors(weighted, combine, rank)
        else:
            result[name] = _factors_of(_combined_delta_weight(weighted, combine), options["svd_rank"] or rank, options)
    return result


def _exported(name: str, layer: WaRALayer, adapter: str) -> LoraModule:
    """Return the adapter's LoRA in one module, in float32 at least, which the SVD and the weights need."""
    dtype = torch.promote_types(layer.factors(adapter)[0].dtype, torch.float32)
    return LoraModule.of(name, layer.low_rank_update(adapter, dtype), None)


def _function(combination_type: str, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Return PEFT's function that makes one tensor of those of several adapters and their weights."""
    function = {**OF_FACTORS, **OF_DELTA_WEIGHTS}[combination_type]
    if function is task_arithmetic:
        return function
    signs = {"majority_sign_method": options["majority_sign_method"]} if function in (ties, dare_ties) else {}
    return partial(function, density=options["density"], **signs)


def _ranks(layers: Mapping[str, WaRALayer], adapters: Sequence[str]) -> dict[str, int]:
    """Return the rank of each adapter as a LoRA, which is the largest of its modules'."""
    return {
        adapter: max(layer.total_rank(adapter) for layer in layers.values() if adapter in layer.wara_A)
        for adapter in adapters
    }


def _combined_factors(weighted: Weighted, combine: Callable[..., Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Combine all A and all B of one module. LoRA fills them up with zeros to the rank that all modules share."""
    pairs = [lora.tensors(rank, lora.update.factor_a.dtype).values() for lora, _ in weighted]
    all_a, all_b = (list(factors) for factors in zip(*pairs, strict=True))
    # The root of a weight goes to either factor, and its sign only to A.
    roots = all_a[0].new_tensor([math.sqrt(abs(weight)) for _, weight in weighted])
    signs = all_a[0].new_tensor([math.copysign(1, weight) for _, weight in weighted])
    return combine(all_a, signs * roots), combine(all_b, roots).flatten(1)


def _combined_delta_weight(weighted: Weighted, combine: Callable[..., Tensor]) -> Tensor:
    """Combine all ΔW of one module, and return the result as a matrix, (m, n · kernel)."""
    updates = [lora.update for lora, _ in weighted]
    deltas = [update.dense() for update in updates]
    combined = combine(deltas, deltas[0].new_tensor([weight for _, weight in weighted]))
    return combined.T if updates[0].kind.keeps_in_first else combined.flatten(1)


def _factors_of(delta_weight: Tensor, rank: int, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return A and B of the best approximation of a rank, or of full rank if that is lower, clamped as in PEFT."""
    u, values, vh = torch.linalg.svd(
        delta_weight, full_matrices=options["svd_full_matrices"], driver=options["svd_driver"]
    )
    rank = min(rank, len(values))
    lora_a, lora_b = vh[:rank], u[:, :rank] * values[:rank]
    if options["svd_clamp"] is not None:
        limit = torch.cat([lora_b.flatten(), lora_a.flatten()]).quantile(options["svd_clamp"])
        lora_a, lora_b = lora_a.clamp(-limit, limit), lora_b.clamp(-limit, limit)
    return lora_a, lora_b


def _check_factors(layers: Mapping[str, WaRALayer], ranks: Mapping[str, int], combination_type: str) -> None:
    grouped = [f"{name!r} ({layer.kind.name})" for name, layer in layers.items() if layer.shape.groups > 1]
    if grouped:
        raise ValueError(
            f"combination_type={combination_type!r} does not take convolutions with groups, over which LoRA shares "
            f"its rank out, such as {first_few(grouped)}. Use '{combination_type}_svd', or 'cat', which is exact."
        )
    if len(set(ranks.values())) > 1:
        listed = ", ".join(f"{name!r} has {rank}" for name, rank in ranks.items())
        raise ValueError(
            f"combination_type={combination_type!r} needs adapters of one rank R, but {listed}. Use "
            f"'{combination_type}_svd', which takes any."
        )
