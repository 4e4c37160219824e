"""Combines adapters in the ways that PEFT has for LoRA: PEFT's functions do it, on the adapters as exact LoRAs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from ..arguments import check_argument
from ..layers.as_lora import LoraModule
from ..layers.base import WaRALayer
from ..messages import first_few


class WeightedLora(NamedTuple):
    """The LoRA of one adapter in one module, and what it is multiplied by.

    Attributes:
        scaling: LoRA's own scaling of B A, where B does not hold it.
    """

    lora: LoraModule
    weight: float
    scaling: float = 1.0


OF_FACTORS: Mapping[str, Callable[..., Tensor]] = {
    "linear": task_arithmetic,
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
    check_density(combination_type, options["density"])
    ranks = _ranks(layers, adapters)
    if combination_type in OF_FACTORS:
        _check_groups(layers, combination_type)
        check_equal_ranks(ranks, combination_type)
    result = {}
    for name, layer in layers.items():
        own = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if adapter in layer.wara_A]
        weighted = [WeightedLora(_exported(name, layer, adapter), weight) for adapter, weight in own]
        result[name] = combined_pair(weighted, combination_type, max(ranks.values()), options)
    return result


def check_density(combination_type: str, density: float | None) -> None:
    """Refuse a density that is missing, or that is no share of values.

    Raises:
        ValueError: the type needs a density and gets none, or the density does not lie in (0, 1].
        TypeError: the density is no number.
    """
    if density is not None:
        check_argument("combine", "density", density, "a number")
        if not 0 < density <= 1:
            raise ValueError(f"density={density!r} is the share of values to keep: more than 0, and at most 1.")
    elif combination_type not in ("svd", "linear"):
        raise ValueError(
            f"combination_type={combination_type!r} needs `density`, the share of values that it keeps, in (0, 1]."
        )


def check_equal_ranks(ranks: Mapping[str, int], combination_type: str) -> None:
    """Refuse adapters of several ranks, given by the adapters' names, for a type of `OF_FACTORS`.

    Raises:
        ValueError: the ranks differ.
    """
    if len(set(ranks.values())) > 1:
        listed = ", ".join(f"{name!r} has {rank}" for name, rank in ranks.items())
        other = "svd" if combination_type == "linear" else f"{combination_type}_svd"
        raise ValueError(
            f"combination_type={combination_type!r} needs adapters of one rank R, but {listed}. Use {other!r}, which "
            "takes any."
        )


def combined_pair(
    weighted: Sequence[WeightedLora], combination_type: str, rank: int, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Combine the LoRAs of one module by PEFT's function of that name.

    Args:
        weighted: the LoRAs.
        combination_type: one of `OF_FACTORS` or `OF_DELTA_WEIGHTS`.
        rank: for factors, the rank to which all are filled up; else the rank of the result, without a `svd_rank`.
        options: as in `WaRAModel.add_weighted_adapter`.

    Returns:
        A and B, as `combine_as_lora` returns them.
    """
    combine = _function(combination_type, options)
    with warnings.catch_warnings():
        # PEFT says for each tensor that a density of 1 prunes nothing.
        warnings.filterwarnings("ignore", message="The density 1")
        if combination_type in OF_FACTORS:
            return _combined_factors(weighted, combine, rank)
        return _factors_of(_combined_delta_weight(weighted, combine), options["svd_rank"] or rank, options)


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


def _combined_factors(
    weighted: Sequence[WeightedLora], combine: Callable[..., Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Combine all A and all B of one module. LoRA fills them up with zeros to the rank that all modules share."""
    pairs = [part.lora.tensors(rank, part.lora.update.factor_a.dtype).values() for part in weighted]
    all_a, all_b = (list(factors) for factors in zip(*pairs, strict=True))
    # The root of a weight goes to either factor, and its sign only to A.
    weights = [part.weight * part.scaling for part in weighted]
    roots = all_a[0].new_tensor([math.sqrt(abs(weight)) for weight in weights])
    signs = all_a[0].new_tensor([math.copysign(1, weight) for weight in weights])
    return combine(all_a, signs * roots), combine(all_b, roots).flatten(1)


def _combined_delta_weight(weighted: Sequence[WeightedLora], combine: Callable[..., Tensor]) -> Tensor:
    """Combine all ΔW of one module, and return the result as a matrix, (m, n · kernel)."""
    deltas = [part.lora.update.dense() * part.scaling for part in weighted]
    combined = combine(deltas, deltas[0].new_tensor([part.weight for part in weighted]))
    return combined.T if weighted[0].lora.update.kind.keeps_in_first else combined.flatten(1)


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


def _check_groups(layers: Mapping[str, WaRALayer], combination_type: str) -> None:
    grouped = [f"{name!r} ({layer.kind.name})" for name, layer in layers.items() if layer.shape.groups > 1]
    if grouped:
        raise ValueError(
            f"combination_type={combination_type!r} does not take convolutions with groups, over which LoRA shares "
            f"its rank out, such as {first_few(grouped)}. Use '{combination_type}_svd', or 'cat', which is exact."
        )
