"""WaRA adapters as LoRA adapters: a copy of the synthesised factors, or the best approximation of a lower rank."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .checks import first
from .config import WaRAConfig, suffix_matches
from .conv import Conv
from .disk.adapter import SavedAdapter, Track, untracked
from .disk.contents import PEFT_PREFIX
from .disk.directory import written_at_once
from .layer import WaRALayer
from .low_rank_update import Decomposition, LowRankUpdate, rank_for_energy, truncation_energy

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for `--max-lora-rank`."""


@torch.no_grad()
def to_lora(
    model: nn.Module | str | os.PathLike[str],
    rank: int | float | None = None,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    strict: bool = False,
    track: Track = untracked,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert a WaRA adapter to LoRA: lora_A = Â of shape (R, n, *kernel), lora_B = scaling · B̂ of shape (m, R).

    With `rank=None` ΔW = lora_B lora_A exactly. With a rank the product is the nearest to ΔW in Frobenius norm, found
    by QR of both factors and an SVD of the R × R core, at a cost of O((m + n) R²); ΔW is not built. There is one
    `r = lora_alpha` for all modules; smaller factors are filled up with zeros. Fully trained modules
    (`modules_to_save`), trained biases and tokens go along, and from a directory embeddings that PEFT saved in full.

    Args:
        model: a model with WaRA adapters (from `get_peft_model`, or with adapters added by transformers), or the path
            of a saved adapter, for which the base model is not needed.
        rank: None is exact; an int is the rank of every module; a float in (0, 1] keeps that share of each module's
            ‖ΔW‖², with the smallest rank that does, and r is the largest of these. In a convolution with groups each
            group gets its share of the rank.
        adapter_name: the adapter to convert. A path may also be that of the directory above it.
        dtype: dtype of the factors; None keeps the adapter's. They are computed in this one or the adapter's,
            whichever is wider, and rounded once.
        strict: raise, in place of a warning, if the adapter holds what engines that serve LoRA do not take.
        track: wraps the loop over module names, to show progress.

    Returns:
        The LoRA's config and its state dict, with keys as PEFT saves them.

    Raises:
        ValueError: the model has no adapter of that name, `rank` is out of range, it has no ΔW (`form="grid"`),
            or under `strict` there is something that engines do not take; for a path, see `SavedAdapter`.
        TypeError: the adapter is not a WaRA adapter, or `rank` or `dtype` is of the wrong type.
    """
    if rank is not None:
        _check_rank(rank)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r} must be a floating-point torch.dtype, such as torch.bfloat16.")
    adapter = _adapter(model, adapter_name, dtype)
    _tell_what_engines_refuse(adapter, strict)
    for text in adapter.warnings:
        warnings.warn(text)
    pairs = {name: _pairs(name, adapter.updates[name], rank) for name in track(adapter.updates)}
    common = rank if isinstance(rank, int) else _common_rank(adapter.updates, pairs)
    state_dict = dict(adapter.others)
    for name, update in adapter.updates.items():
        for key, value in _lora_tensors(update, pairs[name], common).items():
            own = update.factor_a
            state_dict[f"{PEFT_PREFIX}{name}.{key}"] = value.to(own.device, dtype or adapter.dtypes[name]).contiguous()
    return _lora_config(adapter, common), state_dict


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module | str | os.PathLike[str],
    rank: int | float | None = None,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    strict: bool = False,
) -> None:
    """Save a WaRA adapter as a LoRA checkpoint (`adapter_model.safetensors`, `adapter_config.json`) that PEFT loads.

    Args:
        path: directory to write to, made if it is not there. Both files appear when they are complete; other files in
            it are left alone.
        model, rank, adapter_name, dtype, strict: as in `to_lora`, whose errors apply; nothing is written then.

    Raises:
        ValueError: `path` is a file.
    """
    with written_at_once(path, existing="update") as directory:
        write_lora(directory, *to_lora(model, rank, adapter_name, dtype=dtype, strict=strict))


def write_lora(directory: Path, config: LoraConfig, state_dict: dict[str, Tensor]) -> None:
    """Write what `to_lora` returns into a directory, which is there."""
    save_file(state_dict, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(directory))


class LoraErrors(NamedTuple):
    """Relative errors ‖ΔW − LoRA‖ / ‖ΔW‖ in Frobenius norm: of all modules together, and of each by name."""

    total: float
    modules: dict[str, float]


@torch.no_grad()
def lora_error(
    model: nn.Module | str | os.PathLike[str], rank: int | float, adapter_name: str = "default"
) -> LoraErrors:
    """How far a LoRA that `to_lora` makes with this rank is from the adapter, without making it.

    √(Σ_{i > rank} σ_i²) / √(Σ_i σ_i²) over the singular values σ_i of ΔW; zero where ΔW is zero.

    Args:
        model, rank, adapter_name: as in `to_lora`, whose errors apply.
    """
    _check_rank(rank)
    energies = {}
    for name, update in _adapter(model, adapter_name, None).updates.items():
        parts = update.decomposition()
        energies[name] = truncation_energy(parts, _kept_rank(name, update, parts, rank))
    lost, whole = (sum(values) for values in zip(*energies.values(), strict=True))
    return LoraErrors(_ratio(lost, whole), {name: _ratio(*energy) for name, energy in energies.items()})


def vllm_max_lora_rank(rank: int) -> int | None:
    """Smallest `--max-lora-rank` with which vLLM serves a LoRA of that rank; None if there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


@dataclass
class _Adapter:
    """An adapter to convert, from a model or from a directory."""

    config: WaRAConfig
    updates: dict[str, LowRankUpdate]
    others: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    """dtype of each module's parameters; the updates may be in a wider one."""
    exclude_modules: str | None = None
    warnings: list[str] = field(default_factory=list)


TIED = (
    "This adapter is shared by the input embedding and layers tied to it. The exported LoRA computes alike, but "
    "PEFT's LoRA merges it twice into the one tied weight: to merge, merge the WaRA adapter."
)


def _adapter(model: nn.Module | str | os.PathLike[str], adapter_name: str, dtype: torch.dtype | None) -> _Adapter:
    if isinstance(model, nn.Module):
        return _from_model(model, adapter_name, dtype)
    if isinstance(model, (str, os.PathLike)):
        return _from_directory(Path(model), adapter_name, dtype)
    raise TypeError(f"model={model!r} must be a model with WaRA adapters, or the path of a saved one.")


def _from_directory(path: Path, adapter_name: str, dtype: torch.dtype | None) -> _Adapter:
    # PEFT saves an adapter of any other name in a directory of that name.
    saved = SavedAdapter(path / adapter_name if (path / adapter_name).is_dir() else path)
    own = {name: saved.factors(name)[0].dtype for name in saved.modules}
    return _Adapter(
        config=saved.config,
        updates={name: saved.update(name, _wider(own[name], dtype)) for name in saved.modules},
        others={PEFT_PREFIX + key: saved.other(key) for key in saved.others},
        dtypes=own,
        warnings=[TIED] if saved.tied else [],
    )


def _from_model(model: nn.Module, adapter_name: str, dtype: torch.dtype | None) -> _Adapter:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}, only {', '.join(map(repr, configs)) or 'none'}.")
    config = configs[adapter_name]
    if not isinstance(config, WaRAConfig):
        raise TypeError(f"Adapter {adapter_name!r} is of type {config.peft_type.value}, not WARA.")
    for module in model.modules():
        if isinstance(module, WaRALayer):
            module.check_has_delta_weight([adapter_name])
    adapted = {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, WaRALayer) and adapter_name in module.wara_A
    }
    layers = {name: layer for name, layer in adapted.items() if adapter_name not in layer.tied_to}
    own = {name: layer.factors(adapter_name)[0].dtype for name, layer in layers.items()}
    names = [name.removeprefix(PEFT_PREFIX) for name, _ in model.named_modules()]
    return _Adapter(
        config=config,
        updates={
            name: layer.low_rank_update(adapter_name, _wider(own[name], dtype)) for name, layer in layers.items()
        },
        others={
            key if key.startswith(PEFT_PREFIX) else PEFT_PREFIX + key: value
            for key, value in get_peft_model_state_dict(
                model, adapter_name=adapter_name, save_embedding_layers=False
            ).items()
            if ".wara_" not in key
        },
        dtypes=own,
        exclude_modules=suffix_matches(layers, names),
        warnings=[*_about_convolutions(layers), *([TIED] if len(layers) < len(adapted) else [])],
    )


def _wider(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(own, dtype or own)


def _about_convolutions(layers: dict[str, WaRALayer]) -> Iterator[str]:
    different = [
        repr(name)
        for name, layer in layers.items()
        if isinstance(layer, Conv)
        and (set(layer.convolution.dilation) != {1} or layer.convolution.padding_mode != "zeros")
    ]
    if different:
        yield (
            f"PEFT's LoRA computes without the dilation and padding mode of {first(different)}. The exported "
            "factors are exact; merge the exported LoRA before use to have them computed as here."
        )


def _tell_what_engines_refuse(adapter: _Adapter, strict: bool) -> None:
    refused = []
    kinds: dict[str, list[str]] = {}
    for name, update in adapter.updates.items():
        if update.kernel or update.kind == "Embedding":
            kinds.setdefault(update.kind, []).append(repr(name))
    for kind, names in kinds.items():
        refused.append(f"adapters of {kind} layers ({first(names)})")
    others = [repr(key.removeprefix(PEFT_PREFIX)) for key in adapter.others]
    if others:
        refused.append(f"weights trained or saved in full ({first(others)})")
    if refused:
        text = (
            f"PEFT loads all of this LoRA, but engines that serve LoRA take adapters of linear layers alone, not "
            f"{' and '.join(refused)}."
        )
        if strict:
            raise ValueError(f"{text} Merge the adapter instead, or export it without `strict`.")
        warnings.warn(text)


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"rank={rank!r} must be an int or a float.")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank={rank!r} must be at least 1.")
    if isinstance(rank, float) and not 0.0 < rank <= 1.0:
        raise ValueError(f"rank={rank!r} is a share of the energy when it is a float: more than 0 and at most 1.")


def _kept_rank(name: str, update: LowRankUpdate, parts: list[Decomposition], rank: int | float) -> int:
    """The rank to truncate each group of a module to."""
    if isinstance(rank, float):
        return rank_for_energy(parts, rank)
    if rank % update.groups:
        raise ValueError(
            f"rank={rank!r} must be a multiple of the {update.groups} groups of the convolution {name!r}."
        )
    return rank // update.groups


def _pairs(name: str, update: LowRankUpdate, rank: int | float | None) -> list[tuple[Tensor, Tensor]]:
    """For each group A and B, as they are or truncated."""
    if rank is None:
        return update.pairs()
    parts = update.decomposition()
    kept = _kept_rank(name, update, parts, rank)
    return [part.truncated(kept) for part in parts]


def _common_rank(updates: dict[str, LowRankUpdate], pairs: dict[str, list[tuple[Tensor, Tensor]]]) -> int:
    """The largest rank that a module needs, as a multiple of all numbers of groups, which LoRA asks for."""
    largest = max(len(pairs[name][0][0]) * update.groups for name, update in updates.items())
    step = math.lcm(*(update.groups for update in updates.values()))
    return -(-largest // step) * step


def _lora_tensors(update: LowRankUpdate, pairs: Iterable[tuple[Tensor, Tensor]], rank: int) -> dict[str, Tensor]:
    """PEFT's LoRA parameters of one module, filled up with zeros to that rank.

    In a grouped convolution LoRA's A sees all in channels and its B is grouped: each group gets its share of the rank,
    and rows of A that are zero on the other groups' channels.
    """
    share, channels = rank // update.groups, update.factor_a.shape[1]
    padded_a, padded_b = [], []
    for group, (factor_a, factor_b) in enumerate(pairs):
        missing = share - len(factor_a)
        rows = F.pad(factor_a, (0, 0, 0, missing)).view(share, channels, *update.kernel)
        around = (group * channels, (update.groups - 1 - group) * channels)
        padded_a.append(F.pad(rows, (*(0 for _ in update.kernel for _ in range(2)), *around)))
        padded_b.append(F.pad(factor_b, (0, missing)))
    lora_a, lora_b = torch.cat(padded_a), torch.cat(padded_b)
    if update.kind == "Embedding":
        return {"lora_embedding_A": lora_a, "lora_embedding_B": lora_b}
    return {"lora_A.weight": lora_a, "lora_B.weight": lora_b.view(*lora_b.shape, *(1 for _ in update.kernel))}


def _lora_config(adapter: _Adapter, rank: int) -> LoraConfig:
    config = adapter.config
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(adapter.updates),
        exclude_modules=adapter.exclude_modules,
        fan_in_fan_out=all(update.kind == "Conv1D" for update in adapter.updates.values()),
        bias="lora_only" if config.bias == "wara_only" else config.bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=config.inference_mode,
    )


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole > 0 else 0.0
