"""Reads WaRA adapters from `pytorch_lora_weights.safetensors`, the file in which diffusers saves any kind of adapter.

A model's `save_lora_adapter` writes one adapter, with its keys as they are. A pipeline's `save_lora_weights`, which
training scripts call, writes the adapters of several components, and puts the component's name before each key. Both
put the adapters' configs into the file's metadata. There is no other place for them, so a file without is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints.tensors import TensorFile
from .contents import PEFT_PREFIX

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"


class ComponentFile(TensorFile):
    """The tensors of one adapter in a file of diffusers, under the keys that PEFT would give them.

    Args:
        path: the file.
        component: the component whose adapter to read, if the file has several.

    Attributes:
        config: the fields of the adapter's config.
        component: the component's name, or None if the file does not name components.

    Raises:
        ValueError: the file is not complete, has no configs, does not have the component that is asked for, or has
            several components and none is asked for.
    """

    def __init__(self, path: Path, component: str | None) -> None:
        super().__init__(path)
        self.component, self.config = _component(_configs(str(path), self.metadata), component, str(path))
        self._prefix = "" if self.component is None else f"{self.component}."
        self.tensors = {
            PEFT_PREFIX + key.removeprefix(self._prefix): info
            for key, info in self.tensors.items()
            if key.startswith(self._prefix)
        }

    def read(self, keys: Iterable[str]) -> list[Tensor]:
        return super().read(self._prefix + key.removeprefix(PEFT_PREFIX) for key in keys)


def _configs(name: str, metadata: dict[str, str]) -> dict[str | None, dict[str, Any]]:
    """The fields of each config in a file's metadata, by component; None is the key if there are no components."""
    try:
        fields = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name!r} has no config of an adapter in its metadata ({METADATA_KEY!r}), without which it cannot be "
            "read. Let save_lora_weights write it (unet_lora_adapter_metadata=...), or use save_lora_adapter."
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{METADATA_KEY!r} in the metadata of {name!r} is not a JSON object.")
    # Every config has a `peft_type`. Without a component before it, the file is of a single model; with components,
    # their names are the parts before ".peft_type".
    if "peft_type" in fields:
        return {None: fields}
    components = [key.removesuffix(".peft_type") for key in fields if key.endswith(".peft_type")]
    return {
        component: {
            key.removeprefix(f"{component}."): value
            for key, value in fields.items()
            if key.startswith(f"{component}.")
        }
        for component in components
    }


def _component(
    configs: dict[str | None, dict[str, Any]], component: str | None, name: str
) -> tuple[str | None, dict[str, Any]]:
    """Choose the component to read, and its config.

    A file without names of components holds one adapter, which is read whichever component is asked for.
    """
    held = " and ".join(map(repr, configs)) or "none"
    if None not in configs and component is not None and component not in configs:
        raise ValueError(f"{name!r} holds adapters of {held}, not of {component!r}.")
    if len(configs) != 1 and component is None:
        raise ValueError(
            f"{name!r} holds adapters of {held}. Name the one to read by component=..., with format='diffusers' (on "
            "the command line --component)."
        )
    key = component if component in configs else next(iter(configs))
    return key, configs[key]
