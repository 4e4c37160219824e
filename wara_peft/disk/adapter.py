"""Reading a saved adapter by itself, without its base model, and without trusting it.

An adapter directory holds `adapter_config.json`, whose `module_shapes` give the dimensions, and
`adapter_model.safetensors`. Names, shapes and ranks are compared from the file's header before anything is allocated,
values when they are read. Pickles are never opened.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checks import first
from ..config import WaRAConfig, scaling
from ..factors import FACTORS, IN_DIM, OUT_DIM, SubbandFactor
from ..layer import KINDS
from ..low_rank_update import LowRankUpdate
from ..tiny import TinyFactor, tiny_factors
from ..wavelet import axis_sizes
from .checkpoint import read_json

PEFT_PREFIX = "base_model.model."
KIND_NAMES = ("Linear", *(kind.__name__ for kind in KINDS))
Track = Callable[[Collection[str]], Iterable[str]]
"""Wraps a loop over names to show its progress, as `rich.progress.track` does."""


@dataclass(frozen=True)
class ModuleShape:
    """An adapted module: kind of its base layer, lengths of its out and in axes (in channels of one group), groups."""

    kind: str
    out_features: int
    in_features: int
    groups: int = 1


class SavedAdapter:
    """A WaRA adapter on disk.

    Args:
        path: the directory that holds `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        config: its `WaRAConfig`.
        modules: the `ModuleShape` of each adapted module by name, in natural order, layer 2 before layer 10.
        others: shapes of what else it holds (fully trained modules, biases, tokens, embeddings) by key, without PEFT's
            prefix.

    Raises:
        FileNotFoundError: there is no such directory, or a file is missing.
        ValueError: the adapter is not a WaRA adapter, is saved as a pickle or without its basis, cut short, or
            contradicts itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"There is no adapter directory {str(path)!r}.")
        self.config = _read_config(self.path / CONFIG_NAME)
        self.modules = self._read_shapes()
        if self.config.form == "tiny" and not self.config.save_basis:
            raise ValueError(
                f"The adapter in {str(self.path)!r} was saved without its basis (save_basis=False), which only its "
                "base model can give again: load it on that, and use the model."
            )
        self._file = self.path / SAFETENSORS_WEIGHTS_NAME
        if not self._file.is_file():
            pickled = self.path / WEIGHTS_NAME
            remedy = (
                f"; {str(pickled)!r} is a pickle, which may run any code and is not opened. Load the adapter where "
                "you trust it, and save it again with `safe_serialization=True`."
                if pickled.exists()
                else "."
            )
            raise FileNotFoundError(f"There is no file {str(self._file)!r}{remedy}")
        self._kernels: dict[str, tuple[int, ...]] = {}
        shapes = self._shapes_in_file()
        self._expected = {name: self._expected_shapes(name, shapes) for name in self.modules}
        self.others = self._check_keys(shapes)

    @cached_property
    def tied(self) -> bool:
        """Whether the embedding's adapter may be shared by layers tied to it."""
        return self.config.ensure_weight_tying and any(shape.kind == "Embedding" for shape in self.modules.values())

    def check_has_delta_weight(self, module: str) -> None:
        """Refuse an adapter whose change of the output no weight can make.

        Raises:
            ValueError: it has `form="grid"`.
        """
        if self.config.form == "grid":
            raise ValueError(
                f"The adapter in {str(self.path)!r} has form='grid', and in module {module!r} it mixes tokens, which "
                "no weight of a layer can do: it has no ΔW, and cannot be merged or converted to LoRA. Serve it "
                "unmerged."
            )

    def factors(self, module: str) -> tuple[SubbandFactor, SubbandFactor]:
        """The modules that hand out Â and B̂ of an adapted module, on the CPU.

        Raises:
            ValueError: a value is not finite, or the adapter has no ΔW (`form="grid"`).
        """
        self.check_has_delta_weight(module)
        shape, config = self.modules[module], self.config
        ranks = config.ranks_of(module)
        rows: SubbandFactor
        columns: SubbandFactor
        parts: dict[str, nn.Module]
        if config.form == "tiny":
            sizes, diagonal = (shape.out_features, shape.in_features), config.core == "diagonal"
            basis, core, rows, columns = tiny_factors(
                module, config.wavelet, config.levels, sizes, ranks, diagonal, config.save_basis
            )
            parts = {"wara_basis": basis, "wara_core": core}
        else:
            new = FACTORS[config.form]
            with torch.device("meta"):
                rows = new(config.wavelet, config.levels, shape.in_features, ranks, IN_DIM, self._kernels[module])
                columns = new(config.wavelet, config.levels, shape.out_features, ranks, OUT_DIM)
            parts = {"wara_A": rows, "wara_B": columns}
        for prefix, part in parts.items():
            names = list(part.state_dict())
            tensors = self._read(f"{module}.{prefix}.{name}" for name in names)
            part.load_state_dict(dict(zip(names, tensors, strict=True)), assign=True)
        return rows, columns

    @torch.no_grad()
    def coefficients(self, module: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A_s, (r_s, n_j, *kernel), and scaling · B_s, (m_j, r_s), of each subband of an adapted module.

        For `form="tiny"` the core is part of B_s; for a shared pair of `form="grid"` a subband's gain is.
        """
        scale = self.scaling(module)
        if self.config.form != "grid":
            factor_a, factor_b = self.factors(module)
            found = {name: (factor_a.subband(name), factor_b.subband(name) * scale) for name in factor_a.subbands}
            if isinstance(factor_b, TinyFactor):
                cores = factor_b.core.named_parameters()
                matrices = {name: core.diag() if factor_b.core.diagonal else core for name, core in cores}
                found = {name: (rows, columns @ matrices[name]) for name, (rows, columns) in found.items()}
            return found
        all_rows, all_columns = self._read([f"{module}.wara_A.weight", f"{module}.wara_B.weight"])
        ranks = {name: rank for name, rank in self.config.ranks_of(module).items() if rank}
        if self.config.shared_grid_pair:
            (gains,) = self._read([f"{module}.wara_gain"])
            return {name: (all_rows, all_columns * gain * scale) for name, gain in zip(ranks, gains, strict=True)}
        pairs = zip(all_rows.split(list(ranks.values())), all_columns.split(list(ranks.values()), 1), strict=True)
        return {name: (rows, columns * scale) for name, (rows, columns) in zip(ranks, pairs, strict=True)}

    def rank(self, module: str) -> int:
        """R of an adapted module: the rank of its adapter between x and the result."""
        ranks = self.config.ranks_of(module)
        return next(iter(ranks.values())) if self.config.shared_grid_pair else sum(ranks.values())

    def scaling(self, module: str) -> float:
        """Factor of B̂ Â in an adapted module."""
        return scaling(self.config.alpha_of(module), self.rank(module), self.config.use_rslora)

    def parameters(self, module: str) -> int:
        """Number of parameters that the adapter trains for an adapted module."""
        return sum(math.prod(shape) for key, shape in self._expected[module].items() if ".wara_basis." not in key)

    def weight_shape(self, module: str) -> tuple[int, ...]:
        """Shape in which the base model keeps the weight of an adapted module."""
        shape = self.modules[module]
        if shape.kind in ("Conv1D", "Embedding"):
            return shape.in_features, shape.out_features
        return shape.out_features, shape.in_features, *self._kernels[module]

    def update(
        self, module: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> LowRankUpdate:
        """ΔW of an adapted module as a pair of factors, with the scaling inside.

        Args:
            module: its name.
            dtype: dtype to compute in; None means that of the file.
            device: device of the result.
        """
        shape = self.modules[module]
        factors = self.factors(module)
        with torch.no_grad():
            factor_a, factor_b = (factor.synthesise(dtype).to(device) for factor in factors)
            return LowRankUpdate(shape.kind, factor_a, factor_b * self.scaling(module), shape.groups)

    def other(self, key: str) -> Tensor:
        """The tensor of one of the keys in `others`."""
        return next(iter(self._read([key])))

    def _read(self, keys: Iterable[str]) -> list[Tensor]:
        tensors = []
        with safe_open(self._file, framework="pt") as file:
            for key in keys:
                tensor = file.get_tensor(PEFT_PREFIX + key)
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"{str(self._file)!r} is broken: {key!r} holds values that are not finite. Use an earlier "
                        "checkpoint."
                    )
                tensors.append(tensor)
        return tensors

    def _read_shapes(self) -> dict[str, ModuleShape]:
        where = f"module_shapes in {str(self.path / CONFIG_NAME)!r}"
        if not isinstance(self.config.module_shapes, dict) or not self.config.module_shapes:
            raise ValueError(
                f"{where} is empty. Load the adapter on its base model and save it again to have it filled."
            )
        shapes = {}
        for name, entry in sorted(self.config.module_shapes.items(), key=_natural_order):
            if not (
                isinstance(entry, list)
                and len(entry) in (3, 4)
                and entry[0] in KIND_NAMES
                and all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in entry[1:])
            ):
                raise ValueError(f"{where} has {entry!r} for {name!r}; [kind, out, in] was expected.")
            shapes[name] = ModuleShape(*entry)
            if shapes[name].out_features % shapes[name].groups:
                raise ValueError(f"{where} has {entry!r} for {name!r}, whose groups do not divide its out channels.")
        return shapes

    def _shapes_in_file(self) -> dict[str, tuple[int, ...]]:
        """Shapes by key, from the header alone."""
        try:
            with safe_open(self._file, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is not a dict
                found = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(self._file)!r} is not a complete safetensors file: {error}.") from error
        shapes = {}
        for key, (shape, dtype) in found.items():
            if not key.startswith(PEFT_PREFIX):
                raise ValueError(
                    f"{str(self._file)!r} has the key {key!r}, which does not start with {PEFT_PREFIX!r}."
                )
            if not dtype.startswith(("F", "BF")):
                raise ValueError(f"{str(self._file)!r} has {key!r} of dtype {dtype}, which is not a float.")
            shapes[key.removeprefix(PEFT_PREFIX)] = shape
        return shapes

    def _check_keys(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Compare what is in the file with what the config says; returns what is not a factor."""
        expected = {key: shape for of_module in self._expected.values() for key, shape in of_module.items()}
        missing = [key for key in expected if key not in shapes]
        if missing:
            raise ValueError(
                f"{str(self._file)!r} lacks {first(list(map(repr, missing)))}, which its config asks for."
            )
        for key, shape in expected.items():
            if shapes[key] != shape:
                raise ValueError(
                    f"{str(self._file)!r} has {key!r} of shape {shapes[key]}, but its config asks for {shape}."
                )
        others = {key: shape for key, shape in shapes.items() if key not in expected}
        stray = [key for key in others if not self._is_known(key)]
        if stray:
            raise ValueError(
                f"{str(self._file)!r} holds {first(list(map(repr, stray)))}, of which its config says nothing."
            )
        return others

    def _expected_shapes(self, name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """What the config says of one module's adapter, by key."""
        module, config = self.modules[name], self.config
        ranks = {band: rank for band, rank in config.ranks_of(name).items() if rank}
        if not ranks:
            raise ValueError(f"The config in {str(self.path)!r} gives module {name!r} no rank.")
        if config.form == "grid":
            total = self.rank(name)
            gain = {f"{name}.wara_gain": (len(ranks), total)} if config.shared_grid_pair else {}
            pair = {
                f"{name}.wara_A.weight": (total, module.in_features),
                f"{name}.wara_B.weight": (module.out_features, total),
            }
            return {**pair, **gain}
        by_level = {level: rank for level, rank in enumerate(config.level_ranks_of(name)) if rank}
        kernel = self._kernels[name] = self._kernel(name, shapes.get(f"{name}.wara_A.level{min(by_level)}", ()))
        in_sizes = axis_sizes(module.in_features, config.levels)
        out_sizes = axis_sizes(module.out_features, config.levels)
        side_a, side_b = ("wara_basis.A_", "wara_basis.B_") if config.form == "tiny" else ("wara_A.", "wara_B.")
        expected: dict[str, tuple[int, ...]] = {}
        for level, rank in by_level.items():
            expected[f"{name}.{side_a}level{level}"] = (rank, in_sizes[level], *kernel)
            expected[f"{name}.{side_b}level{level}"] = (out_sizes[level], rank)
        if config.form == "tiny":
            for band, rank in ranks.items():
                expected[f"{name}.wara_core.{band}"] = (rank,) if config.core == "diagonal" else (rank, rank)
        return expected

    def _kernel(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Kernel size of a convolution, of which only the file knows; empty for other layers."""
        kind = self.modules[name].kind
        dimensions = int(kind[4]) if re.fullmatch(r"Conv\dd", kind) else 0
        kernel = shape[2:] if dimensions else ()
        if len(kernel) != dimensions:
            raise ValueError(f"{str(self._file)!r} holds no {dimensions}-d kernel for module {name!r}.")
        return kernel

    def _is_known(self, key: str) -> bool:
        """Whether the config, or PEFT's habit of saving embeddings, explains a key that is not a factor."""
        if ".wara_" in key:
            return False
        module, _, parameter = key.rpartition(".")
        module = module.removesuffix(".base_layer")
        # PEFT compares the ends of names, of the module or of one that it is a part of.
        parents = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
        if any(parent.endswith(tuple(self.config.modules_to_save or ())) for parent in parents):
            return True
        if parameter == "bias":
            return self.config.bias != "none"
        if parameter == "trainable_tokens_delta":
            return bool(self.config.trainable_token_indices)
        of_embedding = module in self.modules and self.modules[module].kind == "Embedding"
        return parameter == "weight" and (of_embedding or module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)


def untracked(names: Collection[str]) -> Iterable[str]:
    """A `Track` that shows nothing."""
    return names


def _natural_order(item: tuple[str, Any]) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", item[0])]


def _read_config(path: Path) -> WaRAConfig:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    fields = read_json(path)
    if fields.get("peft_type") != "WARA":
        raise ValueError(f"{str(path)!r} is not of a WaRA adapter: its peft_type is {fields.get('peft_type')!r}.")
    try:
        config = WaRAConfig.from_peft_type(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
    assert isinstance(config, WaRAConfig)
    return config
