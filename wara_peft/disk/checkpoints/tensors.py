"""Safetensors files: what is in them, by the header alone, and their tensors one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...compiled import plain_name

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of the dtypes that weights are computed in; shorter floats have scales beside them."""
INTEGERS = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype, by safetensors' name, of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str


class TensorFile:
    """A safetensors file.

    safetensors itself reads the header, and compares it with the size of the file, which huggingface_hub's
    `parse_local_safetensors_file_metadata` does not.

    Attributes:
        tensors: the `TensorInfo` of each tensor by the key that it has where the model is not compiled.
        metadata: what else the header says.

    Raises:
        ValueError: the file is cut short, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            self._keys = {plain_name(key): key for key in file.keys()}  # noqa: SIM118  # no dict
            self.tensors = {key: self._info(file.get_slice(own)) for key, own in self._keys.items()}

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(self.path)!r} is not a complete safetensors file: {error}.") from error

    @staticmethod
    def _info(part: Any) -> TensorInfo:
        return TensorInfo(tuple(part.get_shape()), part.get_dtype())

    def read(self, keys: Iterable[str]) -> list[Tensor]:
        """The tensors of these keys."""
        with self._open() as file:
            return [file.get_tensor(self._keys[key]) for key in keys]
