"""Gives converters one view of an adapter in a model or on disk: each module's ΔW, and all other tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from ...arguments import short_form
from ...base_layers.kinds import ModuleShape
from ...base_layers.lora_places import has_attention, lora_key
from ...compiled import on_plain_model
from ...config import WaRAConfig
from ...config_fields.name_patterns import suffix_matches
from ...layers.base import WaRALayer
from ...layers.lookup import adapted_layers, saved_keys, wara_config
from ...layers.low_rank_update import LowRankUpdate
from ...messages import first_few
from .adapter import SavedAdapter
from .contents import PEFT_PREFIX

TIED_IN_MODEL = (
    "This adapter is shared by the input embedding and layers tied to it. The exported LoRA computes alike, but "
    "PEFT's LoRA merges it twice into the one tied weight: to merge, merge the WaRA adapter."
)
NOT_TIED_BY_PEFT = (
    "This adapter is shared by the input embedding {} and layers tied to it. PEFT's LoRA ties no layers to an "
    "embedding of this name, so the exported LoRA computes without them until it is merged: merge it before use, or "
    "merge the WaRA adapter."
)
ATTENTION = (
    "PEFT's LoRA of nn.MultiheadAttention adds the update of out_proj twice (0.21 and before; its pull request 3774 "
    "mends that). For such a version, halve each `out_proj.lora_B.weight`, or merge the adapter instead."
)
IF_TIED = "If its base model ties layers to the input embedding, the following holds. "


@dataclass(frozen=True)
class AdapterSource:
    """An adapter to convert, from a model or from a directory.

    Attributes:
        config: the adapter's configuration.
        modules: shape of each adapted module by name.
        dtypes: dtype of each adapted module's parameters, by the module's name.
        update: computes ΔW of the module of a name, in a dtype.
        others: tensors that the adapter holds in full (trained modules, biases, tokens), by PEFT's keys. Those in a
            directory are read from the file when they are looked up.
        exclude_modules: a pattern for modules that PEFT would take for targets by the ends of their names, though
            they are not adapted; None if there are no such modules, or the model is not at hand.
        base_class: name of the base model's class, and of the Python module that defines it, if these are known.
        component: the component of a diffusion pipeline that the base model is, if the adapter's file says so.
        warnings: sentences about what a LoRA with this adapter's weights does differently.
    """

    config: WaRAConfig
    modules: dict[str, ModuleShape]
    dtypes: dict[str, torch.dtype]
    update: Callable[[str, torch.dtype], LowRankUpdate]
    others: Mapping[str, Tensor]
    exclude_modules: str | None = None
    base_class: tuple[str, str] | None = None
    component: str | None = None
    warnings: list[str] = field(default_factory=list)


@on_plain_model
def adapter_source(
    model: nn.Module | str | os.PathLike[str], adapter_name: str, component: str | None = None
) -> AdapterSource:
    """Find an adapter in a model or in a directory.

    Args:
        model: a model with the adapter, or the directory that the adapter was saved in.
        adapter_name: the adapter's name.
        component: for a file of diffusers that holds the adapters of several components, the component to read.

    Raises:
        ValueError: the model has no adapter of that name, or the adapter has no ΔW; for a path, see `SavedAdapter`.
        TypeError: the adapter is not a WaRA adapter, or `model` is neither a model nor a path.
    """
    if isinstance(model, nn.Module):
        return _of_model(model, adapter_name)
    if isinstance(model, (str, os.PathLike)):
        return _in_directory(adapter_directory(model, adapter_name), component)
    raise TypeError(
        f"model must be a model with WaRA adapters, or the path of a saved one, and is {short_form(model)}."
    )


def adapter_directory(path: str | os.PathLike[str], adapter_name: str) -> Path:
    """The directory of an adapter: PEFT saves an adapter that is not named "default" in a folder of its name."""
    inner = Path(path, adapter_name)
    return inner if inner.is_dir() else Path(path)


def _in_directory(path: Path, component: str | None) -> AdapterSource:
    saved = SavedAdapter(path, component)
    for name in saved.modules:
        saved.check_has_delta_weight(name)
    return AdapterSource(
        config=saved.config,
        modules=saved.modules,
        dtypes={name: saved.dtype(name) for name in saved.modules},
        update=saved.update,
        others=_OthersOnDisk(saved),
        base_class=_recorded_class(saved.config),
        component=saved.component,
        warnings=[
            *([IF_TIED + _about_ties(saved.modules)] if saved.tied else []),
            *([ATTENTION] if has_attention(saved.modules.values()) else []),
        ],
    )


class _OthersOnDisk(Mapping[str, Tensor]):
    """The tensors that a saved adapter holds in full, read when they are looked up: an embedding may be large."""

    def __init__(self, saved: SavedAdapter) -> None:
        self._saved = saved
        self._own = {PEFT_PREFIX + lora_key(saved.modules, key): key for key in saved.others}

    def __getitem__(self, key: str) -> Tensor:
        return self._saved.other(self._own[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def _recorded_class(config: WaRAConfig) -> tuple[str, str] | None:
    """The class of the base model and its module, which PEFT records in a config that has no task type."""
    recorded = config.auto_mapping or {}
    name, module = recorded.get("base_model_class"), recorded.get("parent_library")
    return (name, module) if isinstance(name, str) and isinstance(module, str) else None


def _of_model(model: nn.Module, adapter_name: str) -> AdapterSource:
    config = wara_config(model, adapter_name)
    adapted = {name.removeprefix(PEFT_PREFIX): layer for name, layer in adapted_layers(model, adapter_name).items()}
    for layer in adapted.values():
        layer.check_has_delta_weight([adapter_name])
    # A tied layer has no factors of its own. The layer that it is tied to stands for it.
    layers = {name: layer for name, layer in adapted.items() if adapter_name not in layer.tied_to}
    base_class = type(model.get_base_model() if isinstance(model, PeftModel) else model)
    # With its default, "auto", PEFT would ask the Hub for the size of the base's vocabulary, and might add the base
    # weights of embeddings.
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    factors = saved_keys(model, adapter_name)
    modules = {name: layer.shape for name, layer in layers.items()}
    others = {
        PEFT_PREFIX + lora_key(modules, key.removeprefix(PEFT_PREFIX)): value
        for key, value in state_dict.items()
        if key not in factors
    }
    return AdapterSource(
        config=config,
        modules=modules,
        dtypes={name: layer.factors(adapter_name)[0].dtype for name, layer in layers.items()},
        update=lambda name, dtype: layers[name].low_rank_update(adapter_name, dtype),
        others=others,
        exclude_modules=suffix_matches(layers, [name.removeprefix(PEFT_PREFIX) for name, _ in model.named_modules()]),
        base_class=(base_class.__name__, base_class.__module__),
        warnings=[
            *_about_convolutions(layers),
            *([_about_ties(modules)] if len(layers) < len(adapted) else []),
            *([ATTENTION] if has_attention(modules.values()) else []),
        ],
    )


def _about_ties(modules: Mapping[str, ModuleShape]) -> str:
    """What PEFT's LoRA does otherwise, where layers use the adapter of the input embedding.

    PEFT decides by the embedding's name whether it ties layers to it. It knows that of Llama, but not `shared`, as T5
    and BART call theirs.
    """
    embeddings = [name for name, shape in modules.items() if shape.kind.has_vocabulary]
    unknown = [repr(name) for name in embeddings if name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES]
    return NOT_TIED_BY_PEFT.format(first_few(unknown)) if len(unknown) == len(embeddings) else TIED_IN_MODEL


def _about_convolutions(layers: dict[str, WaRALayer]) -> Iterator[str]:
    """Warn of convolutions with settings (dilation, padding mode) that PEFT's LoRA ignores when it computes."""
    different = [
        repr(name) for name, layer in layers.items() if layer.kind.settings_lora_ignores(layer.get_base_layer())
    ]
    if different:
        yield (
            f"PEFT's LoRA computes without the dilation and padding mode of {first_few(different)}. The exported "
            "factors are exact; merge the exported LoRA before use to have them computed as here."
        )
