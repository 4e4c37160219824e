"""Combines saved adapters into a LoRA, without their base model: `wara-peft combine`.

A WaRA adapter takes part as the exact LoRA that `to_lora` makes of it. "cat" puts factors side by side. "svd" is the
best approximation of that: it is computed from the factors, where PEFT decomposes each ΔW. PEFT's functions
compute all other types, of the tensors and weights that `LoraModel.add_weighted_adapter` gives them.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from ..arguments import check_argument, check_whole_number
from ..base_layers.kinds import ModuleShape
from ..base_layers.lora_places import fan_in_fan_out
from ..disk.adapters.adapter import Track, no_progress_bar
from ..disk.adapters.contents import PEFT_PREFIX
from ..disk.adapters.lora_modules import SavedLoraModules
from ..disk.checkpoints.directory import written_at_once
from ..disk.checkpoints.tensors import FLOATS
from ..injection.combine import COMBINATION_TYPES
from ..injection.peft_combinations import OF_FACTORS, WeightedLora, check_density, check_equal_ranks, combined_pair
from ..layers.as_lora import LoraModule, common_rank
from ..layers.low_rank_update import update_of
from ..messages import first_few
from .combinable import Saved, common_modules, frozen_weights, lora_ranks, open_adapter
from .export import write_lora

OPTIONS = {
    "svd_rank": None,
    "svd_clamp": None,
    "svd_full_matrices": False,
    "svd_driver": None,
    "majority_sign_method": "total",
}
"""The options of PEFT that `combine_adapters` does not have. All but one are PEFT's defaults: full matrices would give
the same ΔW, and take longer."""


class Combination(NamedTuple):
    """What `combine_adapters` has written.

    Attributes:
        config: the LoRA's config.
        error: ‖ΔW − Σ_i weights[i] ΔW_i‖ / ‖Σ_i weights[i] ΔW_i‖ of all modules, in Frobenius norm and apart from
            rounding; None if the type does not approximate that sum.
        rounded: whether factors were rounded to a narrower dtype than the adapters'.
    """

    config: LoraConfig
    error: float | None
    rounded: bool


@torch.no_grad()
def combine_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    path: str | os.PathLike[str],
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    track: Track = no_progress_bar,
) -> Combination:
    """Write a LoRA that combines saved adapters, as `LoraModel.add_weighted_adapter` combines those of a model.

    "cat" gives ΔW = Σ_i weights[i] ΔW_i exactly, and "svd" the matrix of a rank that is nearest to it. A module that
    only some adapters have is combined from these. One adapter is scaled exactly, whatever the type.

    Args:
        adapters: directories of saved adapters of one base model, each of WaRA or LoRA.
        weights: a weight for each adapter, which may be negative.
        path: directory to write; it is empty until it is complete.
        combination_type: one of PEFT's. "cat" adds up the ranks. "linear", "ties", "dare_linear", "dare_ties" and
            "magnitude_prune" combine all A and all B apart, and need adapters of one rank. "svd", "ties_svd",
            "dare_linear_svd", "dare_ties_svd" and "magnitude_prune_svd" combine ΔW.
        svd_rank: rank of the result, for the types that end in "svd"; None is the largest of the adapters' ranks.
        density: the share of values to keep, in (0, 1], for "ties", "dare" and "magnitude_prune".
        seed: decides which values "dare" drops. PyTorch's own random state stays as it is.
        dtype: dtype of the factors to write; None is the widest that the adapters have in a module. The factors are
            computed in float32 or a wider dtype, and rounded once.
        device: where to compute.
        overwrite: replace `path` if it is there.
        track: wraps the loop over module names, to show progress.

    Raises:
        FileNotFoundError: a directory or file is missing, or the tensors are saved as a pickle.
        ValueError: the numbers of adapters and weights differ; the type is unknown, lacks an option or does not know
            it, takes no unequal ranks or no convolutions with groups; an adapter is neither WaRA nor LoRA, is damaged,
            is a variant such as DoRA, trained something in full (`modules_to_save`, biases, tokens), or adapts bare
            parameters, factorised layers or tied embeddings; or adapters have one module in different sizes. All of
            this is found before tensors are read. Also if a value is not finite, or adapters hold different weights
            of one embedding. Nothing is written then.
        TypeError: an argument is of the wrong type.

    Warns:
        UserWarning: by their configs, the adapters were trained on base models of different names.

    Example:
        >>> combine_adapters(["my-adapter", "my-lora"], [0.7, 0.3], "both", "cat")  # doctest: +SKIP
    """
    check_argument("combine_adapters(adapters, weights, path)", "path", path, "a str or os.PathLike")
    _check_arguments(adapters, weights, combination_type, svd_rank, density, dtype)
    if len(adapters) == 1 and svd_rank is None:
        combination_type = "cat"
    saved = [open_adapter(adapter) for adapter in adapters]
    modules = common_modules(saved)
    frozen = frozen_weights(saved, modules)
    ranks = [lora_ranks(adapter) for adapter in saved]
    if combination_type in OF_FACTORS:
        named = {str(adapter.path): max(own.values()) for adapter, own in zip(saved, ranks, strict=True)}
        check_equal_ranks(named, combination_type)
    rank = svd_rank or max(max(own.values()) for own in ranks)
    _check_groups(modules, combination_type, rank)
    dtypes = {name: _widest(adapter.dtype(name) for adapter in saved if name in adapter.modules) for name in modules}
    # All checks come before the directory is made: until here only configs and headers of files were read.
    with written_at_once(path, "replace" if overwrite else "refuse", inputs=adapters) as directory:
        parts = []
        with _seeded(seed, device):
            for name in track(modules):
                wide = _widest([dtypes[name], dtype or dtypes[name], torch.float32])
                held = [pair for pair in zip(saved, weights, strict=True) if name in pair[0].modules]
                loras = [_weighted(name, modules[name], *pair, wide, device) for pair in held]
                # Factors that PEFT combines are filled up with zeros to the largest rank that the module has.
                filled = max(own[name] for own in ranks if name in own)
                rank_here = filled if combination_type in OF_FACTORS else rank
                parts.append(_combined(name, modules[name], loras, combination_type, rank_here, density))
        config = _config(saved, modules, common_rank((part.rank, part.update.groups) for part in parts))
        state_dict = {
            f"{PEFT_PREFIX}{part.name}.{key}": value.cpu()
            for part in parts
            for key, value in part.tensors(config.r, dtype or dtypes[part.name]).items()
        }
        state_dict |= {PEFT_PREFIX + key: _same_tensor(holders) for key, holders in frozen.items()}
        write_lora(directory, config, state_dict)
    error = {"cat": 0.0, "svd": _error(parts)}.get(combination_type)
    return Combination(config, error, any(_widest([own, dtype or own]) != (dtype or own) for own in dtypes.values()))


def _check_arguments(
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
    density: float | None,
    dtype: torch.dtype | None,
) -> None:
    call = "combine_adapters(adapters, weights, path)"
    if isinstance(adapters, (str, os.PathLike)):
        raise TypeError(f"{call}: adapters must be a list of paths, and is {adapters!r}.")
    for adapter in adapters:
        check_argument(call, "an adapter", adapter, "a str or os.PathLike")
    for weight in weights:
        check_argument(call, "a weight", weight, "a number")
        if not math.isfinite(weight):
            raise ValueError(f"The weight {weight!r} is not finite.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"There must be a weight for each adapter: {len(adapters)} adapters, {len(weights)} weights.")
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(
            f"combination_type={combination_type!r} is not one of {', '.join(map(repr, COMBINATION_TYPES))}."
        )
    if svd_rank is not None:
        check_whole_number("svd_rank", svd_rank)
        if not combination_type.endswith("svd"):
            raise ValueError(f"svd_rank={svd_rank!r} is for types that end in 'svd', not for {combination_type!r}.")
    if combination_type in ("cat", "linear", "svd"):
        if density is not None:
            raise ValueError(f"density={density!r} has no meaning with combination_type={combination_type!r}.")
    elif len(adapters) > 1 or svd_rank is not None or density is not None:
        check_density(combination_type, density)
    if dtype is not None and dtype not in FLOATS.values():
        raise TypeError(f"dtype={dtype!r} must be a floating-point torch.dtype of 16 bits or more.")


def _check_groups(modules: Mapping[str, ModuleShape], combination_type: str, rank: int) -> None:
    """Refuse convolutions with groups, of which PEFT's functions know nothing, and a rank that groups cannot share."""
    grouped = {repr(name): shape.groups for name, shape in modules.items() if shape.groups > 1}
    if grouped and combination_type not in ("cat", "svd"):
        raise ValueError(
            f"combination_type={combination_type!r} does not take convolutions with groups, over which LoRA shares "
            f"its rank out, such as {first_few(list(grouped))}. Use 'cat', which is exact, or 'svd'."
        )
    unshared = [f"{name} ({groups})" for name, groups in grouped.items() if rank % groups]
    if unshared and combination_type == "svd":
        raise ValueError(
            f"svd_rank={rank} must be a multiple of the numbers of groups of the convolutions {first_few(unshared)}."
        )


@contextmanager
def _seeded(seed: int, device: str | torch.device) -> Iterator[None]:
    """Scope in which PyTorch's random numbers follow from the seed; the state from before returns at its end."""
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.manual_seed(seed)
        yield


def _weighted(
    name: str, shape: ModuleShape, saved: Saved, weight: float, dtype: torch.dtype, device: str | torch.device
) -> WeightedLora:
    """Read the LoRA of one adapter in one module."""
    update = saved.update(name, dtype, device)
    # The scaling of a WaRA adapter lies in B, as in an exported LoRA.
    scaling = saved.scaling(name) if isinstance(saved, SavedLoraModules) else 1.0
    return WeightedLora(LoraModule.of(name, replace(update, kind=shape.kind), None), weight, scaling)


def _combined(
    name: str,
    shape: ModuleShape,
    loras: Sequence[WeightedLora],
    combination_type: str,
    rank: int,
    density: float | None,
) -> LoraModule:
    """Combine the LoRAs of one module."""
    if combination_type in ("cat", "svd"):
        factor_a = torch.cat([part.lora.update.factor_a for part in loras])
        columns = [part.weight * part.scaling * part.lora.update.factor_b for part in loras]
        update = update_of(shape, factor_a, torch.cat(columns, dim=1))
        return LoraModule.of(name, update, rank if combination_type == "svd" else None)
    factor_a, factor_b = combined_pair(loras, combination_type, rank, {**OPTIONS, "density": density})
    factor_a = factor_a.view(-1, shape.in_features, *shape.kernel)
    return LoraModule.of(name, update_of(shape, factor_a, factor_b), None)


def _config(saved: Sequence[Saved], modules: Mapping[str, ModuleShape], rank: int) -> LoraConfig:
    task_types = {adapter.config.task_type for adapter in saved} - {None}
    base = next((adapter.config for adapter in saved if adapter.config.base_model_name_or_path), saved[0].config)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(modules),
        fan_in_fan_out=fan_in_fan_out(modules.values()),
        task_type=task_types.pop() if len(task_types) == 1 else None,
        base_model_name_or_path=base.base_model_name_or_path,
        revision=base.revision,
        inference_mode=True,
    )


def _same_tensor(holders: Sequence[tuple[Saved, str]]) -> Tensor:
    """Read a weight of the base model, which all adapters that hold it must have alike."""
    (first, key), *others = holders
    tensor = first.other(key)
    for saved, own in others:
        if not torch.equal(saved.other(own), tensor):
            raise ValueError(
                f"{str(first.path)!r} and {str(saved.path)!r} hold different values of {own!r}: the adapters were "
                "trained on different base models. Combine adapters of one."
            )
    return tensor


def _error(parts: Sequence[LoraModule]) -> float:
    whole = sum(part.whole for part in parts)
    return math.sqrt(sum(part.lost for part in parts) / whole) if whole > 0 else 0.0


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)
