"""Reads a saved LoRA without its base model: the file itself names the adapted modules, and tells their shapes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ...base_layers.kinds import CONV1D, CONVOLUTIONS, EMBEDDING, LINEAR, Kind, ModuleShape
from ...config_fields.name_patterns import value_for
from ...layers.low_rank_update import LowRankUpdate, update_of
from ..checkpoints.tensors import FLOATS, TensorFile
from .adapter import read_finite
from .contents import PEFT_PREFIX, natural_order
from .lora import LoraContents, SavedLora

FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
"""The ends of the keys under which PEFT saves LoRA's A, and of those for the B that belongs to it."""


class SavedLoraModules(SavedLora):
    """A LoRA on disk, whose modules are read one by one. It has the attributes and methods of `SavedAdapter`.

    Args:
        path: the directory that holds `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        modules: the `ModuleShape` of each adapted module by name, in natural order.
        others: shape and dtype of all other tensors in the file, by key without PEFT's prefix.

    Raises:
        FileNotFoundError, TypeError: see `SavedLora`.
        ValueError: also if the file holds no LoRA, or not the factors that the config asks for, or LoRA's factors of
            a convolution with groups, of an attention as a whole, or of bare parameters.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        modules = _modules(self._file, bool(self.config.fan_in_fan_out))
        self._contents = LoraContents(self.config, modules, set(), self._file)
        self.modules, self.others = self._contents.modules, self._contents.others

    def rank(self, module: str) -> int:
        """The rank of the factors of a module."""
        return next(iter(self._contents.factors[module].values()))[0]

    def dtype(self, module: str) -> torch.dtype:
        """The dtype of the factors of a module."""
        dtypes = {FLOATS[self._contents.tensors[key].dtype] for key in self._contents.factors[module]}
        return functools.reduce(torch.promote_types, dtypes)

    def scaling(self, module: str) -> float:
        """The number by which LoRA multiplies B A in a module."""
        patterns = cast(Mapping[str, float], self.config.alpha_pattern)
        alpha = value_for(module, "alpha_pattern", patterns, self.config.lora_alpha)
        return alpha / (math.sqrt(self.rank(module)) if self.config.use_rslora else self.rank(module))

    def update(self, module: str, dtype: torch.dtype, device: str | torch.device) -> LowRankUpdate:
        """B A of a module as a pair of factors, in that dtype and on that device, without the scaling.

        Raises:
            ValueError: a value in the file is not finite.
        """
        factors = read_finite(self._file, self._contents.factors[module])
        factor_a, factor_b = (factor.to(device, dtype) for factor in factors)
        return update_of(self.modules[module], factor_a, factor_b.flatten(1))

    def other(self, key: str) -> Tensor:
        """Read the tensor that `others` lists under this key."""
        return read_finite(self._file, [key])[0]


def _modules(file: TensorFile, keeps_in_first: bool) -> dict[str, ModuleShape]:
    """Find the modules that a file has factors of.

    Args:
        file: the LoRA's file.
        keeps_in_first: whether layers with factors of two dimensions keep their weights as (in, out).
    """
    found = {}
    for key, info in file.tensors.items():
        end = next((end for end in FACTORS if key.endswith(end)), None)
        if end is None:
            continue
        name = key.removeprefix(PEFT_PREFIX).removesuffix(end)
        where = f"{str(file.path)!r} has {key!r}"
        if ".base_layer" in f".{name}":
            raise ValueError(
                f"{where}, which is of an attention as a whole or of bare parameters. Only the base model tells their "
                "names and shapes: load the LoRA on that, by PEFT."
            )
        partner = file.tensors.get(key.removesuffix(end) + FACTORS[end])
        if partner is None or len(info.shape) < 2 or len(partner.shape) < 2:
            raise ValueError(f"{where} without a lora_B that fits it: the file is not complete, or of another method.")
        kind = _kind(end, len(info.shape), keeps_in_first)
        if kind is None:
            raise ValueError(f"{where} of shape {info.shape}, which is no layer's that LoRA adapts.")
        if partner.shape[1] < info.shape[0] and kind.kernel_dimensions:
            raise ValueError(
                f"{where}, which is of a convolution with {info.shape[0] // max(partner.shape[1], 1)} groups, whose "
                "LoRA is more than one product B A: load it on its base model, by PEFT."
            )
        found[name] = ModuleShape(kind, partner.shape[0], info.shape[1], kernel=info.shape[2:])
    if not found:
        raise ValueError(f"{str(file.path)!r} holds no lora_A: it is not a LoRA's, or of a model without its layers.")
    return dict(sorted(found.items(), key=natural_order))


def _kind(end: str, dimensions: int, keeps_in_first: bool) -> Kind | None:
    if end == ".lora_embedding_A":
        return EMBEDDING if dimensions == 2 else None
    if dimensions == 2:
        return CONV1D if keeps_in_first else LINEAR
    return next((kind for kind in CONVOLUTIONS if kind.kernel_dimensions == dimensions - 2), None)
