"""Statistics of the inputs and gradients of a model's linear layers, in memory and on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...arguments import check_argument
from ...disk.checkpoints.checkpoint import read_json
from ...disk.checkpoints.directory import written_at_once
from ...disk.checkpoints.tensors import FLOATS, TensorFile

MANIFEST = "statistics.json"
UNFINISHED = "unfinished.json"
"""The manifest of a directory whose calibration was interrupted."""
PROBED = 16
"""How many entries of a weight are kept with its statistics, to recognise the layer later."""


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Statistics that calibration has measured for one linear layer with the weight W, (m, n), and inputs x.

    Attributes:
        shape: (m, n).
        count: number of positions that the layer has seen, without masked ones.
        probe: some entries of W, by which the layer is recognised later.
        moment: E[x xᵀ], (n, n), over the positions.
        mean: E[x], (n,), over the positions.
        gradients: E[g gᵀ], (m, m), over the positions, with g = ∂loss/∂(W x), where loss is that of one sample.
        fisher: Σ_i (∂loss/∂W_ij)², (n,), as a mean over samples, where loss is that of one sample.

    Moments are in float64, so that the mean can be taken out of them. Files of version 0.1.0 have float32.
    """

    shape: tuple[int, int]
    count: int
    probe: Tensor
    moment: Tensor | None = None
    mean: Tensor | None = None
    gradients: Tensor | None = None
    fisher: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Give the tensors that are not None, by the names of their attributes."""
        named = {name: getattr(self, name) for name in _shapes(self.shape)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def _shapes(shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    m, n = shape
    return {
        "probe": (min(PROBED, m * n),),
        "moment": (n, n),
        "mean": (n,),
        "gradients": (m, m),
        "fisher": (n,),
    }


def probe_of(weight: Tensor) -> Tensor:
    """Give some entries of a weight at even distances, in float32 on the CPU."""
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // PROBED)][:PROBED].float().cpu()


def save_statistics(path: str | os.PathLike[str], statistics: Mapping[str, LayerStatistics]) -> None:
    """Write statistics into a directory: tensors as safetensors, and a JSON that says which file holds which tensor.

    Raises:
        ValueError: `path` holds files already.
    """
    call = "save_statistics(path, statistics)"
    check_argument(call, "path", path, "a str or os.PathLike")
    check_argument(call, "statistics", statistics, "a mapping")
    with StatisticsWriter(path) as writer:
        writer.add(statistics)


class StatisticsWriter:
    """Context manager that writes statistics into a directory, one file at a time.

    The files appear in it together, when the context ends. If it ends with an error, or is interrupted, complete files
    are kept there as unfinished, and a writer with the same `kinds` goes on with them.

    Args:
        path: the directory.
        kinds: kinds of statistics that are measured.

    Attributes:
        layers: shapes, counts, files and keys of the layers that are written, by name.

    Raises:
        ValueError: `path` holds files already, and they are no unfinished statistics of these kinds.
    """

    def __init__(self, path: str | os.PathLike[str], kinds: Collection[str] = ()) -> None:
        self._old = Path(path)
        self._kinds = sorted(kinds)
        self.layers: dict[str, Any] = {}
        self._files: list[str] = []
        if (self._old / UNFINISHED).is_file():
            self._take_over()
        goes_on = bool(self.layers)
        self._at_once: AbstractContextManager[Path] = written_at_once(path, "replace" if goes_on else "refuse")

    def _take_over(self) -> None:
        manifest = read_json(self._old / UNFINISHED)
        if manifest.get("kinds") != self._kinds:
            raise ValueError(
                f"{str(self._old)!r} holds unfinished statistics of kinds {manifest.get('kinds')}, not {self._kinds}. "
                "Calibrate with these, or remove the directory."
            )
        self.layers = _checked(self._old / UNFINISHED, manifest)[0]
        self._files = sorted({entry["file"] for entry in self.layers.values()})

    def entry(self, name: str) -> LayerStatistics:
        """Give the shape, count and probe of a layer that the directory had from the beginning."""
        layers, files = _checked(self._old / UNFINISHED, {"layers": {name: self.layers[name]}})
        entry = layers[name]
        (probe,) = files[entry["file"]].read([entry["tensors"]["probe"]])
        return LayerStatistics(tuple(entry["shape"]), entry["count"], probe)

    def __enter__(self) -> StatisticsWriter:
        self._directory = self._at_once.__enter__()
        for file in self._files:
            os.link(self._old / file, self._directory / file)
        return self

    def add(self, statistics: Mapping[str, LayerStatistics]) -> None:
        """Write the statistics of some layers into a file. A tensor that several layers share is written once."""
        file = f"statistics-{len(self._files) + 1:05d}.safetensors"
        key_of: dict[int, str] = {}  # by the `id` of a tensor
        tensors: dict[str, Tensor] = {}
        added = {}
        for name, entry in statistics.items():
            keys = {}
            for what, tensor in entry.tensors().items():
                keys[what] = key_of.setdefault(id(tensor), f"{name}.{what}")
                tensors[keys[what]] = tensor.contiguous()
            added[name] = {"file": file, "shape": entry.shape, "count": entry.count, "tensors": keys}
        save_file(tensors, self._directory / file)
        self._files.append(file)
        self.layers |= added

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is not None and not self.layers:
            return self._at_once.__exit__(*error)
        finished = error[0] is None
        manifest = {"layers": self.layers} if finished else {"kinds": self._kinds, "layers": self.layers}
        text = json.dumps(manifest, indent=2)
        (self._directory / (MANIFEST if finished else UNFINISHED)).write_text(text + "\n", encoding="utf-8")
        # A file that was not written to its end is in no manifest.
        for file in self._directory.glob("*.safetensors"):
            if file.name not in self._files:
                file.unlink()
        self._at_once.__exit__(None, None, None)
        return None


def load_statistics(path: str | os.PathLike[str]) -> Mapping[str, LayerStatistics]:
    """Open statistics that `calibrate` or `save_statistics` has written. A layer's tensors are read on access.

    Raises:
        FileNotFoundError: `path` holds no statistics, or one of their files is missing.
        ValueError: the files are broken or do not fit each other. Values are only checked by the functions that use
            them.
    """
    check_argument("load_statistics(path)", "path", path, "a str or os.PathLike")
    return _SavedStatistics(Path(path))


class _SavedStatistics(Mapping[str, LayerStatistics]):
    def __init__(self, path: Path) -> None:
        manifest = path / MANIFEST
        if not manifest.is_file():
            stopped = (
                " Calibration into it was interrupted; call it again, to go on."
                if (path / UNFINISHED).is_file()
                else ""
            )
            raise FileNotFoundError(
                f"There is no file {str(manifest)!r}; `calibrate(..., path=...)` writes it.{stopped}"
            )
        self._layers, self._files = _checked(manifest, read_json(manifest))

    def __getitem__(self, name: str) -> LayerStatistics:
        entry = self._layers[name]
        values = self._files[entry["file"]].read(entry["tensors"].values())
        return LayerStatistics(
            tuple(entry["shape"]), entry["count"], **dict(zip(entry["tensors"], values, strict=True))
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def check_finite(name: str, entry: LayerStatistics) -> None:
    """Refuse statistics that are not finite.

    Raises:
        ValueError: a tensor of the entry holds NaN or infinity.
    """
    for what, tensor in entry.tensors().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"The {what} of {name!r} is not finite. Look for broken batches or weights, or calibrate in a wider "
                "dtype."
            )


def _checked(manifest: Path, content: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, TensorFile]]:
    """Give the entries of layers in a manifest, and the files that they name, after a check of both.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the manifest or a file is broken, or they do not fit each other.
    """
    layers = content.get("layers")
    if not isinstance(layers, dict):
        raise ValueError(f"{str(manifest)!r} has no layers.")
    files: dict[str, TensorFile] = {}
    for name, entry in layers.items():
        _check_entry(manifest, name, entry, files)
    return layers, files


def _check_entry(manifest: Path, name: str, entry: Any, files: dict[str, TensorFile]) -> None:
    path = manifest.parent
    # The JSON may come from anyone. A file name with a directory in it could point outside of `path`.
    try:
        file, count, keys = entry["file"], entry["count"], entry["tensors"]
        shape = tuple(entry["shape"])
        # `isinstance` would take True and False for numbers.
        are_sizes = all(type(number) is int and number >= 0 for number in (*shape, count))
        if len(shape) != 2 or not are_sizes or Path(file).name != file or "probe" not in keys:
            raise TypeError
        if file not in files:
            if not (path / file).is_file():
                raise FileNotFoundError(f"{str(manifest)!r} names the file {file!r}, which is not beside it.")
            files[file] = TensorFile(path / file)
        shapes = _shapes(shape)
        infos = {what: (shapes[what], files[file].tensors[key]) for what, key in keys.items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(manifest)!r} says of {name!r} what cannot be: {entry!r}.") from error
    for what, (expected, info) in infos.items():
        if info.shape != expected or info.dtype not in FLOATS:
            raise ValueError(
                f"{str(path / file)!r} has the {what} of {name!r} with shape {info.shape} and dtype {info.dtype}; "
                f"{expected} in floating point was expected. Calibrate again."
            )
