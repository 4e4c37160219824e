"""Combines adapters in the ways that PEFT has for LoRA (SVD, TIES, DARE, pruning): PEFT does it on exported LoRAs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from ..base_layers.lora_places import fan_in_fan_out
from ..disk.adapters.contents import PEFT_PREFIX
from ..disk.adapters.source import adapter_source
from ..layers.as_lora import LoraModule, common_rank
from ..layers.base import WaRALayer
from ..messages import first_few

OF_FACTORS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Types that combine all Â, and separately all B̂. All adapters need the same rank, which the result has too."""
OF_DELTA_WEIGHTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""Types that combine all ΔW of a module, and reduce the result to a rank by SVD."""
NEW = "combined"


def combine_as_lora(
    model: nn.Module,
    layers: Mapping[str, WaRALayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    options: Mapping[str, Any],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Convert adapters to exact LoRAs, and give what `LoraModel.add_weighted_adapter` makes of these.

    The LoRAs are put into a temporary model that has only stand-ins for the adapted layers, with weights of zeros that
    take no memory. PEFT draws its random numbers as usual, so a seed gives the same result as with LoRA. `model` does
    not change.

    Args:
        model: the model.
        layers: its adapted layers by name, in the order of the model.
        adapters, weights, combination_type, options: as in `WaRAModel.add_weighted_adapter`.

    Returns:
        For each module A, (rank, n, *kernel), and B, (m, rank). The update is B A, with scaling 1.

    Raises:
        ValueError: the type does not support a kind of layer or a rank, or needs a density and gets none; or an
            adapter cannot be converted to LoRA.
    """
    if combination_type != "svd" and options["density"] is None:
        raise ValueError(
            f"combination_type={combination_type!r} needs `density`, the share of values that it keeps, in [0, 1]."
        )
    _check_layers(layers, combination_type)
    places = {name: str(index) for index, name in enumerate(layers)}
    # The user's names may be ones that PEFT refuses for a LoRA.
    names = [f"adapter{index}" for index in range(len(adapters))]
    loras = [_lora(model, adapter, places) for adapter in adapters]
    _check_ranks(adapters, [config for config, _ in loras], combination_type)
    if combination_type in OF_DELTA_WEIGHTS:
        _check_sides(layers, options["svd_rank"] or max(config.r for config, _ in loras), combination_type)
    gpus = {value.device for _, tensors in loras for value in tensors.values() if value.is_cuda}
    # LoRA's initialisation draws values that are overwritten at once. It must not advance the user's random numbers,
    # which DARE draws from below.
    with torch.random.fork_rng(gpus):
        host = nn.ModuleList([_stand_in(layer, _some(loras, places[name])) for name, layer in layers.items()])
        host_model: PeftModel = get_peft_model(host, loras[0][0], adapter_name=names[0])
        for name, (config, _) in zip(names[1:], loras[1:], strict=True):
            host_model.add_adapter(name, config)
        for name, (_, tensors) in zip(names, loras, strict=True):
            set_peft_model_state_dict(host_model, tensors, adapter_name=name)
    tuner = cast(LoraModel, host_model.base_model)
    tuner.add_weighted_adapter(names, list(weights), NEW, combination_type=cast(Any, combination_type), **options)
    made = get_peft_model_state_dict(host_model, adapter_name=NEW, save_embedding_layers=False)
    result = {}
    for name, layer in layers.items():
        lora_a, lora_b = (made[f"{PEFT_PREFIX}{places[name]}.{key}"] for key in layer.kind.lora_names)
        # If the rank is larger than a side of ΔW, PEFT's SVD may give A more rows than B has columns.
        rank = min(len(lora_a), lora_b.shape[1])
        result[name] = lora_a[:rank], lora_b[:, :rank].flatten(1)
    return result


def _lora(model: nn.Module, adapter: str, places: Mapping[str, str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert an adapter to a LoRA of the stand-ins, whose names in the temporary model are `places`."""
    source = adapter_source(model, adapter)
    with torch.no_grad():
        modules = [LoraModule.of(name, source.update(name, source.dtypes[name]), None) for name in source.modules]
        rank = common_rank((part.rank, part.update.groups) for part in modules)
        tensors = {
            f"{PEFT_PREFIX}{places[part.name]}.{key}": value
            for part in modules
            for key, value in part.tensors(rank, source.dtypes[part.name]).items()
        }
    targets = "|".join(places[name] for name in source.modules)
    in_first = fan_in_fan_out(source.modules.values())
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, fan_in_fan_out=in_first), tensors


def _some(loras: Sequence[tuple[LoraConfig, Mapping[str, Tensor]]], place: str) -> Tensor:
    """Find some factor for the stand-in with this name, of any adapter; its dtype and device serve as examples."""
    prefix = f"{PEFT_PREFIX}{place}."
    return next(value for _, tensors in loras for key, value in tensors.items() if key.startswith(prefix))


def _stand_in(layer: WaRALayer, some: Tensor) -> nn.Module:
    """Make a layer of the same kind and shape, with the dtype and device of `some`, whose weight is a single zero."""
    shape = layer.shape
    # PEFT reads the shape and device of the weight. An expanded zero has both, and takes the memory of one number.
    with torch.device("meta"):
        module = shape.kind.stand_in(shape)
    zero = torch.zeros((), dtype=some.dtype, device=some.device)
    module.weight = nn.Parameter(zero.expand(shape.weight_shape), requires_grad=False)
    return module


def _check_layers(layers: Mapping[str, WaRALayer], combination_type: str) -> None:
    refused = [
        f"{name!r} ({layer.kind.name}{', with groups' if layer.shape.groups > 1 else ''})"
        for name, layer in layers.items()
        if layer.shape.groups > 1 or (combination_type in OF_DELTA_WEIGHTS and len(layer.shape.kernel) in (1, 3))
    ]
    if refused:
        raise ValueError(
            f"PEFT's combination_type={combination_type!r} does not take convolutions such as {first_few(refused)}. "
            "Use 'cat', which is exact."
        )


def _check_ranks(adapters: Sequence[str], configs: Sequence[LoraConfig], combination_type: str) -> None:
    if combination_type in OF_FACTORS and len({config.r for config in configs}) > 1:
        ranks = ", ".join(f"{name!r} has {config.r}" for name, config in zip(adapters, configs, strict=True))
        raise ValueError(
            f"combination_type={combination_type!r} needs adapters of one rank R, but {ranks}. Use "
            f"'{combination_type}_svd', which takes any."
        )


def _check_sides(layers: Mapping[str, WaRALayer], rank: int, combination_type: str) -> None:
    """Refuse a rank above the sides of a convolution's ΔW: PEFT would give it factors that do not fit this rank."""
    sides = {
        name: min(layer.shape.out_features, layer.shape.in_features * math.prod(layer.shape.kernel))
        for name, layer in layers.items()
        if layer.shape.kernel
    }
    smaller = [f"{name!r} (at most {side})" for name, side in sides.items() if side < rank]
    if smaller:
        raise ValueError(
            f"PEFT's combination_type={combination_type!r} does not take rank {rank} for convolutions such as "
            f"{first_few(smaller)}. Give a lower `svd_rank`, or use 'cat', which is exact."
        )
