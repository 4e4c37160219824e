"""Makes a new adapter from several others.

"cat" puts their factors side by side, which is exact. "linear" adds factors up. All other types are PEFT's, and its
functions compute them on the adapters as LoRAs (`peft_combinations`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from ..arguments import check_whole_number
from ..config import WaRAConfig
from ..config_fields.name_patterns import exact_pattern, suffix_matches
from ..forms import SUBBAND
from ..layers.base import WaRALayer
from ..layers.lookup import adapted_layers
from ..wavelet import subbands
from .peft_combinations import OF_DELTA_WEIGHTS, OF_FACTORS, combine_as_lora

COMBINATION_TYPES = ("cat", *OF_FACTORS, *OF_DELTA_WEIGHTS)


def combine(
    tuner: BaseTuner,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    options: Mapping[str, Any],
) -> None:
    """Add a combination of adapters to the tuner.

    Arguments and errors are those of `WaRAModel.add_weighted_adapter`.
    """
    _check(tuner, adapters, weights, adapter_name, combination_type)
    if options["svd_rank"] is not None:
        check_whole_number("svd_rank", options["svd_rank"])
    if len(adapters) == 1:  # "cat" gives the exact multiple of a single adapter, of the same rank
        combination_type = "cat"
    layers = {
        name: layer
        for name, layer in adapted_layers(tuner.model).items()
        if any(adapter in layer.wara_A and adapter not in layer.tied_to for adapter in adapters)
    }
    as_lora = None
    if combination_type not in ("cat", "linear"):
        as_lora = combine_as_lora(layers, adapters, weights, combination_type, options)
    elif combination_type == "linear":
        _check_equal_layouts(layers, adapters)
    configs = [cast(WaRAConfig, tuner.peft_config[adapter]) for adapter in adapters]
    # Pairs of one subband can be joined only if all adapters have the same subbands. Otherwise "cat" synthesises the
    # factors and joins them as the undecomposed pair `aa0`.
    in_subbands = combination_type == "linear" or (
        combination_type == "cat"
        and len({(config.wavelet, config.levels, config.form) for config in configs}) == 1
        and configs[0].form_object.keeps_subbands
    )
    ranks = {
        name: {"aa0": len(as_lora[name][0])}
        if as_lora
        else _ranks(layer, adapters[:1] if combination_type == "linear" else adapters, in_subbands)
        for name, layer in layers.items()
    }
    config = _config(configs[0], ranks, in_subbands)
    config.ensure_weight_tying = any(other.ensure_weight_tying for other in configs)
    # PEFT ties layers to an embedding only if it knows the name of one of them as a target: `embed_tokens`, `lm_head`.
    tied = [
        name
        for name, layer in adapted_layers(tuner.model).items()
        if any(adapter in layer.tied_to for adapter in adapters)
    ]
    config.target_modules = [*ranks, *tied]
    config.exclude_modules = suffix_matches(config.target_modules, [name for name, _ in tuner.model.named_modules()])
    tuner.peft_config[adapter_name] = config
    # Injection makes factors of the right shapes, which are then overwritten.
    tuner.inject_adapter(tuner.model, adapter_name)
    for name, layer in layers.items():
        if as_lora:
            _put_lora(layer, adapter_name, *as_lora[name])
            continue
        fill = _add_up if combination_type == "linear" else _put_side_by_side if in_subbands else _put_undecomposed
        fill(layer, adapters, weights, adapter_name)


def _check(
    tuner: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"Adapter {adapter_name} already exists; choose another name or delete it first.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"There must be a weight for each adapter, got {len(adapters)} and {len(weights)}.")
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(
            f"combination_type={combination_type!r} is not one of {', '.join(map(repr, COMBINATION_TYPES))}."
        )
    for adapter in adapters:
        reason = cast(WaRAConfig, tuner.peft_config[adapter]).form_object.not_combined.get(combination_type)
        if reason is not None:
            raise ValueError(f"Adapter {adapter!r} cannot be combined by {combination_type!r}: {reason}")
    for name, layer in adapted_layers(tuner.model).items():
        present = [adapter for adapter in adapters if adapter in layer.wara_A]
        if present and layer.kind.is_parameter:
            raise ValueError(
                f"Adapters of bare parameters, as of {name!r}, cannot be combined. Merge one after the other "
                "(`merge_adapter([...])`), or activate several at once: `base_model.set_adapter([...])`."
            )
        if 0 < sum(adapter in layer.tied_to for adapter in present) < len(present):
            raise ValueError(
                f"In module {name!r} some of the adapters {', '.join(present)} are tied to the input embedding's "
                "and some are not; they cannot be combined."
            )
    for name, module in tuner.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = [adapter for adapter in adapters if adapter in module.modules_to_save]
            if len(trained) > 1:
                raise ValueError(
                    f"Adapters {', '.join(trained)} all train module {name!r} in full; they cannot be combined."
                )


def _check_equal_layouts(layers: dict[str, WaRALayer], adapters: list[str]) -> None:
    for name, layer in layers.items():
        layouts = {
            adapter: (type(layer.factors(adapter)[0]), layer.factors(adapter)[0].axis)
            if adapter in layer.wara_A
            else None
            for adapter in adapters
        }
        if len(set(layouts.values())) > 1:
            names = ", ".join(adapters)
            raise ValueError(
                f"combination_type='linear' needs equal layouts, but {names} differ in module {name!r} in wavelet, "
                "levels, form or ranks. Use 'cat', which is exact."
            )


def _ranks(layer: WaRALayer, adapters: list[str], in_subbands: bool) -> dict[str, int]:
    """Give the ranks of the combination in one layer, by subband."""
    factors = [layer.factors(adapter)[0] for adapter in adapters if adapter in layer.wara_A]
    if not in_subbands:
        return {"aa0": sum(factor.rank for factor in factors)}
    return {
        band.name: sum(factor.ranks.get(band.name, 0) for factor in factors)
        for band in subbands(factors[0].axis.levels)
    }


def _config(first: WaRAConfig, ranks: dict[str, dict[str, int]], in_subbands: bool) -> WaRAConfig:
    """Make the config of the combination. Its scaling is 1, because weights and scalings go into the factors."""
    single_pair = in_subbands and first.form_object.single_pair(first)
    levels = first.levels if in_subbands else 1
    pattern: dict[str, Any] = {}
    for name, of_module in ranks.items():
        every = {band.name: 0 for band in subbands(levels)} | of_module
        pattern[exact_pattern(name)] = next(iter(of_module.values())) if single_pair else every
    return replace(
        first,
        exclude_modules=None,
        init_weights=True,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        trainable_token_indices=None,
        bias="none",
        wavelet=first.wavelet if in_subbands else "haar",
        levels=levels,
        form=cast(Any, first.form if in_subbands else SUBBAND.name),
        subband_ranks=None,
        rank_pattern=pattern,
        wara_alpha=None,
        alpha_pattern={},
        use_rslora=False,
        module_shapes=None,
        core="full",
        save_basis=True,
        base_weight_hashes=None,
        biased_modules=None,
    )


def _weighted(layer: WaRALayer, adapters: list[str], weights: list[float]) -> list[tuple[str, float]]:
    """List the adapters that this layer has, each with its weight times its scaling."""
    pairs = zip(adapters, weights, strict=True)
    return [(adapter, weight * layer.scaling[adapter]) for adapter, weight in pairs if adapter in layer.wara_A]


@torch.no_grad()
def _put_side_by_side(layer: WaRALayer, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    new_a, new_b = layer.factors(adapter_name)
    for name in new_a.subbands:
        start = 0
        for adapter, weight in _weighted(layer, adapters, weights):
            factor_a, factor_b = layer.factors(adapter)
            if name in factor_a.subbands:
                rank = factor_a.ranks[name]
                new_a.subband(name).narrow(0, start, rank).copy_(factor_a.subband(name))
                new_b.subband(name).narrow(1, start, rank).copy_(weight * factor_b.subband(name))
                start += rank


@torch.no_grad()
def _put_undecomposed(layer: WaRALayer, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    new_a, new_b = layer.factors(adapter_name)
    pairs = [(layer.factors(adapter), weight) for adapter, weight in _weighted(layer, adapters, weights)]
    new_a.subband("aa0").copy_(torch.cat([factor_a.synthesise() for (factor_a, _), _ in pairs]))
    new_b.subband("aa0").copy_(torch.cat([weight * factor_b.synthesise() for (_, factor_b), weight in pairs], dim=1))


@torch.no_grad()
def _put_lora(layer: WaRALayer, adapter_name: str, lora_a: Tensor, lora_b: Tensor) -> None:
    new_a, new_b = layer.factors(adapter_name)
    rows = new_a.subband("aa0")
    rows.copy_(lora_a.reshape(rows.shape))
    new_b.subband("aa0").copy_(lora_b)


@torch.no_grad()
def _add_up(layer: WaRALayer, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    for side, factor in enumerate(layer.factors(adapter_name)):
        for name, parameter in factor.named_parameters():
            parameter.zero_()
            for adapter, weight in _weighted(layer, adapters, weights):
                # As in PEFT's "linear": the root of the weight goes to either factor, and its sign only to A, so that
                # an adapter's own product B A gets the whole weight.
                share = math.copysign(math.sqrt(abs(weight)), weight if side == 0 else 1.0)
                parameter.add_(layer.factors(adapter)[side].get_parameter(name), alpha=share)
