"""WaRA adapters in `pytorch_lora_weights.safetensors`, into which diffusers saves adapters of any kind.

`save_lora_adapter` of a model writes one adapter's keys as they are; `save_lora_weights` of a pipeline, which training
scripts call, those of several components, each key after its component's name. Both put the configs into the file's
metadata, from where alone they can be known: files without are refused.
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
    """The tensors of one adapter in a file of diffusers, under the keys that PEFT would save them by.

    Args:
        path: the file.
        component: which one to read, where the file has several.

    Attributes:
        config: the fields of the adapter's config.
        component: the component's name, or None where the file has no names.

    Raises:
        ValueError: the file is no complete one, has no configs, or not just the one component that is asked for.
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
    """The configs in a file's metadata, by component."""
    try:
        fields = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name!r} has no config of an adapter in its metadata ({METADATA_KEY!r}), without which it cannot be "
            "read. Let save_lora_weights write it (unet_lora_adapter_metadata=...), or use save_lora_adapter."
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{METADATA_KEY!r} in the metadata of {name!r} is not a JSON object.")
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
