"""Makes a model without weights from the config in a checkpoint, and limits what an untrusted config can cost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ... import attention  # noqa: F401  # lets `put_in_place` know of attentions
from ...factorized.key_names import names_on_loading
from ...factorized.saved import put_in_place
from .checkpoint import Checkpoint, read_json

MODULES_PER_TENSOR, SPARE_MODULES = 10, 10_000
"""A model may have this many modules for each tensor in its files, and this many more. Most models have a few modules
without tensors for each one with: containers, activations, dropouts."""


class Skeleton:
    """Makes models from a checkpoint's config, unless it asks for far more modules than the checkpoint has tensors.

    A small config file can ask for a billion layers, and even on the meta device each module takes memory and time.

    Args:
        checkpoint: the checkpoint with the config.
        further_tensors: number of tensors outside of the checkpoint that the model has modules for.

    Attributes:
        config: the checkpoint's config.

    Raises:
        FileNotFoundError: the checkpoint has no config.
        ValueError: the config cannot be used, or asks for far more layers than there are tensors.
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
        """Make the model on the meta device, with factorised layers where the checkpoint has factors.

        Raises:
            ValueError: the model cannot be made, or the checkpoint's factors do not fit it.
        """
        # The config is copied, as models may write into the config that they get.
        with self.blamed(), self.limited(), torch.device("meta"):
            model = model_class(copy.deepcopy(self.config))
        with torch.device("meta"):
            put_in_place(model, self.shapes)
        return model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the checkpoint's tensors by key."""
        return {key: info.shape for key, info in self.checkpoint.tensors.items()}

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Turn an error of the block, in which transformers uses the config, into one that names the config's file."""
        try:
            yield
        except Exception as error:
            reason = str(error).partition("Exception raised from")[0]  # after this PyTorch prints its call stack
            raise ValueError(f"Cannot use {str(self.path)!r}: {type(error).__name__}: {reason}") from error

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Raise from within the block as soon as it has made more modules than the checkpoint can fill."""
        count = 0

        def check(*_: Any) -> None:
            nonlocal count
            count += 1
            if count > self._most:
                raise ValueError(
                    f"its model has more than {self._most} modules, far more than there are tensors beside it."
                )

        # Only a hook on all modules of the process sees modules while a model's constructor makes them.
        handle = register_module_module_registration_hook(check)
        try:
            yield
        finally:
            handle.remove()


def keys_of_parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """For each parameter of a model, the keys in a checkpoint that transformers loads as this parameter.

    A tensor that it converts is left out, because a change of the parameter cannot be carried back through a
    conversion.
    """
    keys_of: dict[str, list[str]] = {}
    for key, name in names_on_loading(model, checkpoint.file_of, model.state_dict()).items():
        keys_of.setdefault(name, []).append(key)
    return keys_of


def _check_numbers_of_layers(fields: Any, path: Path, most: int) -> None:
    """Refuse a config with a number of layers that the files cannot fill.

    `Skeleton.limited` would be too late: config classes already make lists with an entry for each layer.
    """
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
