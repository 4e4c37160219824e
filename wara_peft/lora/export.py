"""Exports WaRA adapters as LoRA adapters: exactly, from the synthesised factors, or approximated at a lower rank."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import id_tensor_storage

from ..arguments import check_argument, check_whole_number
from ..base_layers.lora_places import fan_in_fan_out, lora_name, loras_targets
from ..disk.adapters.adapter import Track, no_progress_bar
from ..disk.adapters.contents import PEFT_PREFIX
from ..disk.adapters.source import AdapterSource, adapter_directory, adapter_source
from ..disk.checkpoints.checkpoint import Checkpoint
from ..disk.checkpoints.directory import file_written_at_once, written_at_once
from ..disk.checkpoints.tensors import FLOATS
from ..layers.as_lora import LoraModule, common_rank
from ..messages import first_few
from .diffusers_files import check_together, component_of, write_components
from .engines import ENGINES, EngineName, FileFormat, check_engine, check_rank, format_for, tell_what_engines_refuse
from .experts import model_without_weights, projections, split_experts, stacks_of_experts, whole_experts
from .gguf_base import GgufBase
from .gguf_files import write_adapter

Model = nn.Module | str | os.PathLike[str]


def to_lora(
    model: Model,
    rank: int | float | None = None,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    strict: bool = False,
    track: Track = no_progress_bar,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert a WaRA adapter to LoRA: lora_A = Â of shape `(R, n, *kernel)`, lora_B = scaling · B̂ of shape (m, R).

    With `rank=None` lora_B lora_A equals ΔW exactly. With a rank the product is the nearest matrix to ΔW in Frobenius
    norm. It is computed by QR of both factors and an SVD of the R × R core, at a cost of O((m + n) R²); ΔW itself is
    never built. The LoRA has one `r = lora_alpha` for all modules; smaller factors are filled up with zeros. Modules
    that trained in full (`modules_to_save`), trained biases and tokens are included, and, if the adapter is read from
    a directory, embeddings that PEFT saved in full.

    Args:
        model: a model with WaRA adapters (from `get_peft_model`, or with adapters added by transformers), or the path
            of a saved adapter, for which the base model is not needed.
        rank: None converts exactly. An int is the rank of every module; a module whose ΔW has a lower rank stays
            exact. A float in (0, 1] gives each module the smallest rank that keeps this share of its ‖ΔW‖², and r is
            the largest of these ranks. In a convolution with groups each group gets its share of the rank.
        adapter_name: the adapter to convert. If `model` is a path, it may also be the directory that contains the
            adapter's directory of this name.
        dtype: dtype of the factors; None keeps the adapter's. The factors are computed in this dtype or the adapter's,
            whichever is wider, and rounded once.
        strict: raise an error, where the default is a warning, if the adapter holds something that engines which serve
            LoRA do not accept.
        track: wraps the loop over module names, to show progress.

    Returns:
        The LoRA's config and its state dict, with keys as PEFT saves them.

    Raises:
        ValueError: the model has no adapter of that name, `rank` is out of range, the adapter has no ΔW
            (`form="grid"`), or, with `strict`, it holds something that engines do not accept; for a path, see
            `SavedAdapter`.
        TypeError: the adapter is not a WaRA adapter, or `rank` or `dtype` is of the wrong type.
    """
    check_argument("to_lora(model, rank)", "model", model, "an nn.Module or a path")
    return convert(model, rank, adapter_name, dtype=dtype, strict=strict, track=track)[:2]


def save_as_lora(
    path: str | os.PathLike[str],
    model: Model | Mapping[str, Model],
    rank: int | float | None = None,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    strict: bool = False,
    format: FileFormat | None = None,
    component: str | None = None,
    base: str | os.PathLike[str] | None = None,
    engine: EngineName | None = None,
) -> None:
    """Save a WaRA adapter as a LoRA that PEFT, a pipeline of diffusers, or an engine loads.

    Args:
        path: directory to write to; it is made if it does not exist. The files appear only when they are complete.
            Other files in the directory stay. With `format="gguf"` it is the file, whose name ends in ".gguf".
        model: as in `to_lora`; with `format="diffusers"` also a dict of several models, by component.
        rank, adapter_name, dtype, strict: as in `to_lora`, whose errors apply; nothing is written then.
        format: "peft" writes `adapter_model.safetensors` and `adapter_config.json`; "diffusers" (which must be
            installed) `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights(path)`; "gguf" (a package
            that must be installed) an adapter for llama.cpp, `llama-server -m base.gguf --lora path`. None is the
            engine's format, or "peft".
        component: with `format="diffusers"`, the model of the pipeline to which the adapter belongs, such as "unet",
            "transformer" or "text_encoder". None derives it from the class of the base model.
        base: with `format="gguf"`, the base model: its directory, or its GGUF file. Llama, Mistral, Qwen2 and Qwen3
            are supported. With an engine that reads experts apart, the base model's directory, whose config tells
            their names; a model, or an adapter whose config names a directory that is there, does not need it.
        engine: what is to load the LoRA: "vllm", "vllm-3d" (vLLM with models whose experts it reads stacked),
            "sglang", "llama.cpp", "diffusers" or "peft". What it does not accept is an error, and experts get the
            names that it reads; see `ENGINES` in `wara_peft.lora.engines`.

    Raises:
        ValueError: `path` is a file, or the adapter's own directory, or `format`, `component`, `base` and `engine` do
            not fit, or the engine does not accept the adapter or its rank; for `format="diffusers"` also what
            `component_of` in `wara_peft.lora.diffusers_files` raises, and for `format="gguf"` what `GgufBase` in
            `wara_peft.lora.gguf_base` raises.
        TypeError: an argument is of the wrong type, for example because two are swapped; see also `to_lora`.

    Example:
        >>> save_as_lora("my-lora", {"unet": unet, "text_encoder": "my-text-adapter"}, format="diffusers")
        ... # doctest: +SKIP
    """
    call = "save_as_lora(path, model, rank)"
    check_argument(call, "path", path, "a str or os.PathLike")
    models = model if isinstance(model, Mapping) else {component: model}
    for item in models.values():
        check_argument(call, "model", item, "an nn.Module or a path")
    format = format_for(engine, format)
    if isinstance(model, Mapping) and (format != "diffusers" or component is not None):
        raise ValueError("Several models, by component, are for format='diffusers', without `component`.")
    paths = [item for item in models.values() if isinstance(item, (str, os.PathLike))]
    inputs = [*paths, *(adapter_directory(item, adapter_name) for item in paths), *([] if base is None else [base])]
    with place_to_write(path, format, "update", inputs) as place:
        to_format = partial(
            convert,
            rank=rank,
            adapter_name=adapter_name,
            dtype=dtype,
            strict=strict,
            format=format,
            base=base,
            engine=engine,
        )
        write_loras(place, [to_format(item, component=name) for name, item in models.items()])


def place_to_write(
    path: str | os.PathLike[str],
    format: FileFormat,
    existing: Literal["refuse", "replace", "update"],
    inputs: Sequence[str | os.PathLike[str]],
) -> AbstractContextManager[Path]:
    """Claim the directory, or for "gguf" the file, that a LoRA is written to; see `written_at_once`."""
    if format != "gguf":
        return written_at_once(path, existing, inputs)
    if Path(path).suffix != ".gguf":
        raise ValueError(f"path={str(path)!r} must be the name of a file that ends in '.gguf', with format='gguf'.")
    return file_written_at_once(path, "refuse" if existing == "refuse" else "replace", inputs)


def write_loras(place: Path, loras: Sequence[Lora]) -> None:
    """Write one LoRA in PEFT's or GGUF's format, or those of a pipeline's components in diffusers'.

    Args:
        place: an existing directory, or for GGUF a file.
        loras: the LoRAs, as `convert` returns them.

    Raises:
        ValueError: the components do not belong together.
    """
    components = [lora.component for lora in loras if lora.component is not None]
    if components:
        check_together(components)
        write_components(place, {name: lora[:2] for name, lora in zip(components, loras, strict=True)})
        return
    (lora,) = loras
    if lora.gguf is not None:
        write_adapter(place, lora.config, lora.state_dict, *lora.gguf)
    else:
        write_lora(place, lora.config, lora.state_dict)


def write_lora(directory: Path, config: LoraConfig, state_dict: dict[str, Tensor]) -> None:
    """Write a LoRA in PEFT's format, as `to_lora` returns it, into an existing directory."""
    # Tied modules that train in full are one tensor with two names, which safetensors refuses to write.
    owner = {id_tensor_storage(value): key for key, value in state_dict.items()}
    apart = {
        key: value if owner[id_tensor_storage(value)] == key else value.clone() for key, value in state_dict.items()
    }
    save_file(apart, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(directory))


class LoraErrors(NamedTuple):
    """Relative errors ‖ΔW − LoRA‖ / ‖ΔW‖ in Frobenius norm: of all modules together, and of each by name."""

    total: float
    modules: dict[str, float]


@torch.no_grad()
def lora_error(model: Model, rank: int | float, adapter_name: str = "default") -> LoraErrors:
    """Measure how far the LoRA that `to_lora` makes with this rank is from the adapter.

    The error is √(Σ_{i > rank} σ_i²) / √(Σ_i σ_i²), with the singular values σ_i of ΔW; it is zero if ΔW is zero.

    Args:
        model, rank, adapter_name: as in `to_lora`, whose errors apply.
    """
    check_argument("lora_error(model, rank)", "model", model, "an nn.Module or a path")
    _check_rank(rank)
    return _errors(_modules(adapter_source(model, adapter_name), rank, None, no_progress_bar))


class Lora(NamedTuple):
    """A LoRA as `to_lora` returns it, with its error.

    Attributes:
        error: how far the LoRA is from the adapter, apart from rounding to `dtype`.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    error: LoraErrors
    rounded: bool
    """Whether the factors were rounded to a narrower dtype than the adapter's."""
    component: str | None
    """The model of a diffusion pipeline to which the LoRA belongs; None in other formats than diffusers'."""
    gguf: tuple[GgufBase, dict[str, str]] | None
    """The base model, and its name of each adapted module's weight; None in other formats than GGUF."""


@torch.no_grad()
def convert(
    model: Model,
    rank: int | float | None = None,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    strict: bool = False,
    format: FileFormat | None = None,
    component: str | None = None,
    base: str | os.PathLike[str] | None = None,
    engine: EngineName | None = None,
    track: Track = no_progress_bar,
) -> Lora:
    """Do the work of `to_lora` and `lora_error` at once, so that each tensor is read and decomposed only once."""
    if rank is not None:
        _check_rank(rank)
    if dtype is not None and dtype not in FLOATS.values():
        raise TypeError(f"dtype={dtype!r} must be a floating-point torch.dtype of 16 bits or more.")
    format = format_for(engine, format)
    apart = engine is not None and ENGINES[engine].experts == "apart"
    if format != "diffusers" and component is not None:
        raise ValueError(f"component={component!r} has no meaning with format={format!r}, only with 'diffusers'.")
    if (format == "gguf") != (base is not None) and not apart:
        raise ValueError(
            f"base={base!r} does not fit format={format!r}: a base model is for 'gguf', which needs one, and for "
            "engines that read experts apart."
        )
    if engine is not None:
        check_rank(engine, rank)
    source = adapter_source(model, adapter_name, component)
    gguf = None
    if format == "diffusers":
        component = component_of(source, component)
    elif format == "gguf" and base is not None:
        wide = [repr(name) for name, own in source.dtypes.items() if (dtype or own) == torch.float64]
        if wide:
            raise ValueError(
                f"llama.cpp computes no LoRA in float64, as of {first_few(wide)}: give dtype=torch.float32."
            )
        gguf_base = GgufBase.read(base)
        gguf = gguf_base, gguf_base.tensor_names(source)
    elif engine is None:
        tell_what_engines_refuse(source, strict)
    if engine is not None:
        check_engine(source, engine)
    stacks = stacks_of_experts(source.modules) if apart else {}
    if stacks:
        base_model = model_without_weights(model, adapter_name, base)
        stacks = whole_experts(base_model, source.modules)
        parts = projections(base_model, stacks)
    elif base is not None and apart:
        Checkpoint(Path(base))  # it is not needed without experts, but has to be there
    for text in source.warnings:
        warnings.warn(text)
    # PEFT's config has one rank. It is known only after all modules are decomposed, if `rank` is a share.
    modules = _modules(source, rank, dtype, track)
    common = common_rank((part.rank, part.update.groups) for part in modules)
    if engine is not None:
        check_rank(engine, common)
    state_dict = dict(source.others)
    for part in modules:
        for key, value in part.tensors(common, dtype or source.dtypes[part.name]).items():
            state_dict[f"{PEFT_PREFIX}{lora_name(source.modules, part.name)}.{key}"] = value
    rounded = dtype is not None and any(_wider(own, dtype) != dtype for own in source.dtypes.values())
    config = _lora_config(source, common)
    if stacks:
        state_dict = split_experts(state_dict, source.modules, stacks, parts)
        own_names = dict.fromkeys(part.name.rpartition(".")[2] for part in parts)
        config.target_modules, config.target_parameters = [*(config.target_modules or ()), *own_names], None
    return Lora(config, state_dict, _errors(modules), rounded, component, gguf)


def _modules(
    source: AdapterSource, rank: int | float | None, dtype: torch.dtype | None, track: Track
) -> list[LoraModule]:
    return [
        LoraModule.of(name, source.update(name, _wider(source.dtypes[name], dtype)), rank)
        for name in track(source.modules)
    ]


def _wider(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(own, dtype or own)


def _errors(modules: list[LoraModule]) -> LoraErrors:
    total = _ratio(sum(part.lost for part in modules), sum(part.whole for part in modules))
    return LoraErrors(total, {part.name: _ratio(part.lost, part.whole) for part in modules})


def _check_rank(rank: int | float) -> None:
    name = f". The adapter's name is given as adapter_name={rank!r}" if isinstance(rank, str) else ""
    check_whole_number("rank", rank, fraction=f"the share of the energy to keep{name}")


def _lora_config(source: AdapterSource, rank: int) -> LoraConfig:
    config = source.config
    target_modules, target_parameters = loras_targets(source.modules)
    # With lora_alpha = r LoRA's own scaling is 1: the factor B holds WaRA's scaling.
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules,
        target_parameters=target_parameters or None,
        exclude_modules=source.exclude_modules,
        fan_in_fan_out=fan_in_fan_out(source.modules.values()),
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
