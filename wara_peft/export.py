"""WaRA adapters as LoRA adapters: a copy of the synthesised factors, without a decomposition and without an error."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, convert_to_lora
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import WaRAConfig, suffix_matches
from .conv import Conv
from .embedding import Embedding
from .layer import WaRALayer

PEFT_PREFIX = "base_model.model."


@torch.no_grad()
def to_lora(
    model: nn.Module, rank: int | float | None = None, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert a WaRA adapter to LoRA: lora_A = Â of shape (R, n, *kernel), lora_B = scaling · B̂ of shape (m, R).

    ΔW = lora_B lora_A exactly, with `r = lora_alpha = R`. Where R differs between modules, the smaller ones are filled
    up with zeros to the largest. Fully trained modules (`modules_to_save`), trained biases and tokens go along.

    Args:
        model: a model with WaRA adapters (from `get_peft_model`, or with adapters added by transformers).
        rank: None is exact; an int or a float is handed to `peft.convert_to_lora`, which approximates ΔW by an SVD.
        adapter_name: the adapter to convert.

    Returns:
        The LoRA's config and its state dict, with keys as PEFT saves them.

    Raises:
        ValueError: the model has no adapter of that name, or the adapter has no ΔW (`form="grid"`).
        TypeError: the adapter is not a WaRA adapter.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}, only {', '.join(map(repr, configs)) or 'none'}.")
    config = configs[adapter_name]
    if not isinstance(config, WaRAConfig):
        raise TypeError(f"Adapter {adapter_name!r} is of type {config.peft_type.value}, not WARA.")
    for module in model.modules():
        if isinstance(module, WaRALayer):
            module.check_has_delta_weight([adapter_name])
    if rank is not None:
        lora_config, state_dict = convert_to_lora(model, rank, adapter_name=adapter_name)
        return lora_config, {_with_prefix(key): value for key, value in state_dict.items()}

    layers = {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, WaRALayer) and adapter_name in module.wara_A and adapter_name not in module.tied_to
    }
    _warn_about_convolutions(layers)
    if any(isinstance(module, WaRALayer) and adapter_name in module.tied_to for module in model.modules()):
        warnings.warn(
            "This adapter is shared by the input embedding and layers tied to it. The exported LoRA computes alike, "
            "but PEFT's LoRA merges it twice into the one tied weight: to merge, merge the WaRA adapter."
        )
    largest = _common_rank(layers.values(), adapter_name)
    state_dict = {
        _with_prefix(key): value
        for key, value in get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        ).items()
        if ".wara_A." not in key and ".wara_B." not in key
    }
    for name, layer in layers.items():
        for key, value in _lora_tensors(layer, adapter_name, largest).items():
            state_dict[f"{PEFT_PREFIX}{name}.{key}"] = value.contiguous()
    lora_config = _lora_config(config, largest, layers)
    names = [name.removeprefix(PEFT_PREFIX) for name, _ in model.named_modules()]
    lora_config.exclude_modules = suffix_matches(layers, names)
    return lora_config, state_dict


def save_as_lora(
    path: str | os.PathLike[str], model: nn.Module, rank: int | float | None = None, adapter_name: str = "default"
) -> None:
    """Save a WaRA adapter as a LoRA checkpoint (`adapter_model.safetensors`, `adapter_config.json`) that PEFT loads.

    Args:
        path: directory to write to, made if it is not there.
        model, rank, adapter_name: as in `to_lora`, whose errors apply; nothing is written then.

    Raises:
        ValueError: `path` is a file.
    """
    directory = Path(path)
    if directory.is_file():
        raise ValueError(f"path={str(path)!r} is a file; name a directory.")
    config, state_dict = to_lora(model, rank=rank, adapter_name=adapter_name)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(directory))


def _warn_about_convolutions(layers: dict[str, WaRALayer]) -> None:
    different = [
        repr(name)
        for name, layer in layers.items()
        if isinstance(layer, Conv)
        and (set(layer.convolution.dilation) != {1} or layer.convolution.padding_mode != "zeros")
    ]
    if different:
        warnings.warn(
            f"PEFT's LoRA computes without the dilation and padding mode of {', '.join(different)}. The exported "
            "factors are exact; merge the exported LoRA before use to have them computed as here."
        )


def _groups(layer: WaRALayer) -> int:
    return int(getattr(layer.get_base_layer(), "groups", 1))


def _common_rank(layers: Iterable[WaRALayer], adapter_name: str) -> int:
    """The largest rank that a layer needs, as a multiple of all numbers of groups, which LoRA asks for."""
    layers = list(layers)
    largest = max(layer.total_rank(adapter_name) * _groups(layer) for layer in layers)
    step = math.lcm(*(_groups(layer) for layer in layers))
    return -(-largest // step) * step


def _lora_tensors(layer: WaRALayer, adapter_name: str, rank: int) -> dict[str, Tensor]:
    """PEFT's LoRA parameters of one layer, filled up with zeros to that rank.

    In a grouped convolution LoRA's A sees all in channels and its B is grouped: each group gets its share of the rank,
    and rows of A that are zero on the other groups' channels.
    """
    factor_a, factor_b = layer.lora_factors(adapter_name)  # (R, n, *kernel), (m, R)
    groups, ones = _groups(layer), [1] * len(layer.kernel)
    missing = rank // groups - factor_a.shape[0]
    padded_b = F.pad(factor_b, (0, missing))
    padded_a = torch.cat((factor_a, factor_a.new_zeros(missing, *factor_a.shape[1:])))
    if isinstance(layer, Embedding):
        return {"lora_embedding_A": padded_a, "lora_embedding_B": padded_b}
    by_group = padded_a.new_zeros(groups, rank // groups, groups, *factor_a.shape[1:])
    for group in range(groups):
        by_group[group, :, group] = padded_a
    return {
        "lora_A.weight": by_group.reshape(rank, groups * factor_a.shape[1], *layer.kernel),
        "lora_B.weight": padded_b.view(*padded_b.shape, *ones),
    }


def _lora_config(config: WaRAConfig, rank: int, layers: dict[str, WaRALayer]) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(layers),
        fan_in_fan_out=all(layer.kind == "Conv1D" for layer in layers.values()),
        bias="lora_only" if config.bias == "wara_only" else config.bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=config.inference_mode,
    )


def _with_prefix(key: str) -> str:
    return key if key.startswith(PEFT_PREFIX) else PEFT_PREFIX + key
