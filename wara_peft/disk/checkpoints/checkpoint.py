"""Reads and writes a model's checkpoint: safetensors in one file or in shards, and the files beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...messages import first_few
from .tensors import TensorFile, TensorInfo

COPIED_ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab")
"""Endings of the files that hold a model's configuration, tokenizer and processor."""
LICENSE_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
"""Beginnings of the names of files that a license may require to be passed on with the weights."""


class Checkpoint:
    """The safetensors files in a model's directory, read for their headers; `read` gives single tensors.

    Attributes:
        base: the directory.
        file_of: the name of the file that holds each key; all keys of one file stand together.
        tensors: shape and dtype of each tensor by key.

    Raises:
        FileNotFoundError: the directory or a file is missing, or the directory holds only pickles.
        ValueError: a file is broken, a key lies in two files, or the index and the files contradict each other.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        if not base.is_dir():
            is_file = ": it is a file; name the directory that it lies in" if base.exists() else ""
            raise FileNotFoundError(f"There is no model directory {str(base)!r}{is_file}.")
        self.file_of: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._opened: dict[str, TensorFile] = {}
        for name, listed in self._files().items():
            self._opened[name] = TensorFile(base / name)
            found = self._opened[name].tensors
            twice = [f"{key!r} (also in {self.file_of[key]!r})" for key in found if key in self.file_of]
            if twice:
                raise ValueError(
                    f"{str(base / name)!r} has {first_few(twice)}: two files must not have one key. Load the model, "
                    "and save it again."
                )
            if not listed <= found.keys():
                missing = first_few([repr(key) for key in sorted(listed - found.keys())])
                raise ValueError(f"{str(base / SAFE_WEIGHTS_INDEX_NAME)!r} says {name!r} has {missing}; it has not.")
            self.file_of.update(dict.fromkeys(found, name))
            self.tensors.update(found)

    def _files(self) -> dict[str, set[str]]:
        """The names of the files, each with the keys that the index lists for it; without an index, with no keys."""
        index = self.base / SAFE_WEIGHTS_INDEX_NAME
        # transformers prefers the single file as well, if a directory has both.
        if (self.base / SAFE_WEIGHTS_NAME).is_file():
            return {SAFE_WEIGHTS_NAME: set()}
        if not index.is_file():
            pickled = sorted(path.name for path in self.base.glob("*.bin"))
            remedy = (
                f" {pickled[0]!r} is a pickle, which may run any code and is not opened; load the model where you "
                "trust it, and save it with `save_pretrained`, which writes safetensors."
                if pickled
                else ""
            )
            if (self.base / ADAPTER_CONFIG).is_file():
                remedy = " It is the directory of an adapter, not of a model."
            raise FileNotFoundError(
                f"{str(self.base)!r} has neither {SAFE_WEIGHTS_NAME!r} nor {SAFE_WEIGHTS_INDEX_NAME!r}.{remedy}"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{str(index)!r} has no weight_map.")
        files: dict[str, set[str]] = {}
        for key, name in weight_map.items():
            # An index that is not trusted must not name files outside of its directory.
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{str(index)!r} names the file {name!r}; a safetensors file beside it was expected.")
            files.setdefault(name, set()).add(key)
        missing = [repr(name) for name in files if not (self.base / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{str(self.base)!r} lacks {first_few(missing)}, which its index names.")
        return files

    def read(self, key: str) -> Tensor:
        (tensor,) = self._opened[self.file_of[key]].read([key])
        return tensor


class ShardWriter:
    """Writes tensors to shards with one shard in memory: a shard is written when a tensor of the next one comes.

    The tensors of one file must be added one after another.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = ""
        self.tensors: dict[str, Tensor] = {}
        self.weight_map: dict[str, str] = {}
        self.total_size = 0

    def add(self, file: str, key: str, tensor: Tensor) -> None:
        if file != self.file:
            self._write()
            self.file = file
        self.tensors[key] = tensor.contiguous()  # safetensors writes no other tensors
        self.weight_map[key] = file
        self.total_size += tensor.nbytes

    def finish(self) -> None:
        """Write the last file, and an index unless the tensors lie in a single file of the standard name."""
        self._write()
        if set(self.weight_map.values()) != {SAFE_WEIGHTS_NAME}:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": self.weight_map}
            (self.directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _write(self) -> None:
        if self.tensors:
            assert not (self.directory / self.file).exists(), f"{self.file} came twice"
            # `save_pretrained` writes this "format" too, and loaders of older versions refuse files without it.
            save_file(self.tensors, self.directory / self.file, metadata={"format": "pt"})
            self.tensors = {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{str(path)!r} is not a JSON object.")
    return fields


def copy_beside(base: Path, directory: Path) -> None:
    """Copy the files of configuration, tokenizer, processor and license from the base's directory.

    The index of the base's shards is left out, as the new checkpoint may have other shards, and so are the files of an
    adapter: transformers would load the adapter onto the merged model.
    """
    for path in base.iterdir():
        wanted = path.suffix in COPIED_ENDINGS or path.name.startswith(LICENSE_NAMES)
        of_weights = path.name.endswith(".index.json") or path.name.startswith("adapter_")
        if path.is_file() and wanted and not of_weights:
            shutil.copyfile(path, directory / path.name)
