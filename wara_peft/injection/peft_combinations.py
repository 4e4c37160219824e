"""Combinations of adapters that PEFT has for LoRA (SVD, TIES, DARE, pruning), computed by PEFT on exported LoRAs."""

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
"""Types that work on Â and B̂ apart, so that all adapters need one rank, which the result has too."""
OF_DELTA_WEIGHTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""Types that build ΔW of a module, and take the result's rank by SVD."""
NEW = "combined"


def combine_as_lora(
    model: nn.Module,
    layers: Mapping[str, WaRALayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    options: Mapping[str, Any],
) -> dict[str, tuple[Tensor, Tensor]]:
    """What `LoraModel.add_weighted_adapter` makes of the adapters, each as the exact LoRA that `to_lora` gives.

    A LoRA model of the adapted layers alone is built for that, whose base weights are zeros that take no memory.
    Random numbers are drawn as PEFT draws them, so a seed gives what it gives there. Nothing of `model` is changed.

    Args:
        model: the model.
        layers: its adapted layers by name, in the order of the model.
        adapters, weights, combination_type, options: as in `WaRAModel.add_weighted_adapter`.

    Returns:
        By module A, (rank, n, *kernel), and B, (m, rank), of an update B A whose scaling is 1.

    Raises:
        ValueError: a kind of layer or a rank that the type does not take, no density where it needs one, or an adapter
            that is no LoRA.
    """
    if combination_type != "svd" and options["density"] is None:
        raise ValueError(
            f"combination_type={combination_type!r} needs `density`, the share of values that it keeps, in [0, 1]."
        )
    _check_layers(layers, combination_type)
    places = {name: str(index) for index, name in enumerate(layers)}
    names = [f"adapter{index}" for index in range(len(adapters))]  # free of what PEFT refuses in a LoRA's name
    loras = [_lora(model, adapter, places) for adapter in adapters]
    _check_ranks(adapters, [config for config, _ in loras], combination_type)
    if combination_type in OF_DELTA_WEIGHTS:
        _check_sides(layers, options["svd_rank"] or max(config.r for config, _ in loras), combination_type)
    gpus = {value.device for _, tensors in loras for value in tensors.values() if value.is_cuda}
    with torch.random.fork_rng(gpus):  # the values that LoRA's initialisation draws are replaced
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
        # Where the rank is larger than ΔW's sides, PEFT's SVD may leave rows of A that no column of B meets.
        rank = min(len(lora_a), lora_b.shape[1])
        result[name] = lora_a[:rank], lora_b[:, :rank].flatten(1)
    return result


def _lora(model: nn.Module, adapter: str, places: Mapping[str, str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter as a LoRA of the layers at these places."""
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
    """A factor of the layer at this place, of whichever adapter."""
    prefix = f"{PEFT_PREFIX}{place}."
    return next(value for _, tensors in loras for key, value in tensors.items() if key.startswith(prefix))


def _stand_in(layer: WaRALayer, some: Tensor) -> nn.Module:
    """A layer of the same kind and shape whose weight is one zero, seen from everywhere, beside this tensor."""
    shape = layer.shape
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
    """PEFT gives a convolution the factors of all ranks, also where its ΔW has fewer."""
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
