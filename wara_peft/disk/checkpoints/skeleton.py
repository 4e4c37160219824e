"""A model without its weights, made from the config in a directory that is not trusted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import CONFIG_NAME

from ...factorized.saved import put_in_place
from .checkpoint import Checkpoint, read_json

MODULES_PER_TENSOR, SPARE_MODULES = 10, 10_000
"""How many modules a model may have for each tensor in its files, and beyond: containers, activations, dropouts."""


class Skeleton:
    """Makes models from a checkpoint's config, of no more modules than its tensors can fill.

    Attributes:
        config: the config.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be used, or asks for far more layers than there are tensors.
    """

    def __init__(self, checkpoint: Checkpoint, further_tensors: int = 0) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.base / CONFIG_NAME
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file {str(self.path)!r}.")
        self._most = MODULES_PER_TENSOR * (len(checkpoint.tensors) + further_tensors) + SPARE_MODULES
        _check_numbers_of_layers(read_json(self.path), self.path, self._most)
        with self.blamed():
            self.config: PreTrainedConfig = AutoConfig.from_pretrained(
                checkpoint.base, local_files_only=True, trust_remote_code=False
            )

    def make(self, model_class: type[PreTrainedModel]) -> PreTrainedModel:
        """The model on the meta device, with factorised layers where the checkpoint has such.

        Raises:
            ValueError: it cannot be made, or factors do not fit it.
        """
        with self.blamed(), self.limited(), torch.device("meta"):
            model = model_class(copy.deepcopy(self.config))
        with torch.device("meta"):
            put_in_place(model, self.shapes)
        return model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self.checkpoint.tensors.items()}

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Say of what goes wrong while transformers makes something from the config that the config is to blame."""
        try:
            yield
        except Exception as error:
            reason = str(error).partition("Exception raised from")[0]  # PyTorch goes on with its call stack
            raise ValueError(f"Cannot use {str(self.path)!r}: {type(error).__name__}: {reason}") from error

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Stop as soon as more modules are made than the checkpoint can fill."""
        count = 0

        def check(*_: Any) -> None:
            nonlocal count
            count += 1
            if count > self._most:
                raise ValueError(
                    f"its model has more than {self._most} modules, far more than there are tensors beside it."
                )

        handle = register_module_module_registration_hook(check)
        try:
            yield
        finally:
            handle.remove()


def keys_of_parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The keys of a checkpoint that transformers loads, without conversion, as each parameter of a model."""
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    parameters = model.state_dict()
    keys_of: dict[str, list[str]] = {}
    for key in checkpoint.file_of:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if converted is None:
            keys_of.setdefault(name, []).append(key)
    return keys_of


def _check_numbers_of_layers(fields: Any, path: Path, most: int) -> None:
    """Refuse numbers of layers that the files cannot fill, for which configs make lists before any model is there."""
    open_fields = [fields]
    while open_fields:
        entry = open_fields.pop()
        if isinstance(entry, dict):
            for name, value in entry.items():
                if "layer" in name and isinstance(value, int) and value > most:
                    raise ValueError(f"{str(path)!r} has {name}={value!r}, far more than there are tensors beside it.")
            open_fields.extend(entry.values())
        elif isinstance(entry, list):
            open_fields.extend(entry)
