"""Reads safetensors files: names, shapes and dtypes from the header, and single tensors."""

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
"""The float dtypes that a weight or factor may have, by safetensors' names. Floats of eight bits and fewer are left
out: they belong to quantized weights, whose values need scales from other tensors."""
INTEGERS = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))


@dataclass(frozen=True)
class TensorInfo:
    """Shape of a tensor in a file, and safetensors' name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


class TensorFile:
    """A safetensors file.

    The safetensors library reads the header, and compares it with the size of the file. `huggingface_hub` has a reader
    of headers too (`parse_local_safetensors_file_metadata`), but it would not notice a file that is cut short.

    Attributes:
        tensors: the `TensorInfo` of each tensor, by its key. The keys of a compiled model are given as those of the
            plain model, without torch.compile's `_orig_mod`.
        metadata: the texts that the header holds besides the tensors, by name.

    Raises:
        ValueError: the file is cut short, or is not a safetensors file.
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
        """Read the tensors of these keys, in their order."""
        with self._open() as file:
            return [file.get_tensor(self._keys[key]) for key in keys]
