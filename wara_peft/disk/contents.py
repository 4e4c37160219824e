"""What an adapter's file must hold by its config, compared with what it does hold, by the header alone."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import EMBEDDING_LAYER_NAMES

from ..checks import first
from ..config import WaRAConfig
from ..layer import KINDS
from ..wavelet import axis_sizes
from .tensors import FLOATS, INTEGERS, TensorFile, TensorInfo

PEFT_PREFIX = "base_model.model."
TOKENS = "trainable_tokens_delta"
"""PEFT's name for the rows of `trainable_token_indices`."""
HEADS = {("SEQ_CLS", "TOKEN_CLS"): ("classifier", "score"), ("QUESTION_ANS",): ("qa_outputs",)}
"""Names that PEFT adds to `modules_to_save`, by task type."""
PEFT_INTERNAL = re.compile(r"\.(modules_to_save|original_module)\.")
"""In keys that PEFT saves twice with `bias="all"`: the biases of a module that is trained in full."""
KIND_NAMES = ("Linear", *(kind.__name__ for kind in KINDS))


@dataclass(frozen=True)
class ModuleShape:
    """An adapted module: kind of its base layer, lengths of its out and in axes (in channels of one group), groups."""

    kind: str
    out_features: int
    in_features: int
    groups: int = 1


class Contents:
    """The tensors of an adapter's file, sorted by what they are.

    Args:
        config: the adapter's configuration.
        modules: the adapted modules by name.
        file: the adapter's file.

    Attributes:
        factors: shapes of each adapted module's tensors by key, without PEFT's prefix.
        kernels: kernel size of each adapted module; empty if it is no convolution.
        others: shape and dtype of what else there is, by key.
        unmentioned: those of `others` that the config does not explain.

    Raises:
        ValueError: the file lacks something, or holds what it must not.

    Warns:
        UserWarning: the file holds what the config does not mention, or no biases where they train.
    """

    def __init__(self, config: WaRAConfig, modules: dict[str, ModuleShape], file: TensorFile) -> None:
        self.config, self.modules = config, modules
        self.name = repr(str(file.path))
        self.tensors = self._check_dtypes(file)
        self.kernels: dict[str, tuple[int, ...]] = {}
        self.factors = {name: self._expected_shapes(name) for name in modules}
        self.others = self._check_keys()
        self._check_promises()

    def _check_dtypes(self, file: TensorFile) -> dict[str, TensorInfo]:
        """What is in the file, by key without PEFT's prefix."""
        found = {}
        for key, info in file.tensors.items():
            if not key.startswith(PEFT_PREFIX):
                raise ValueError(f"{self.name} has the key {key!r}, which does not start with {PEFT_PREFIX!r}.")
            # A module that trains in full may count, as the batches of a batch norm.
            if info.dtype not in FLOATS and (".wara_" in key or info.dtype not in INTEGERS):
                raise ValueError(
                    f"{self.name} has {key!r} of dtype {info.dtype}; one of {', '.join(FLOATS)} is allowed."
                )
            found[key.removeprefix(PEFT_PREFIX)] = info
        return found

    def _check_keys(self) -> dict[str, TensorInfo]:
        """Compare what is in the file with what the config says; returns what is not a factor."""
        expected = {key: shape for of_module in self.factors.values() for key, shape in of_module.items()}
        missing = [repr(key) for key in expected if key not in self.tensors]
        if missing:
            raise ValueError(f"{self.name} lacks {first(missing)}, which its config asks for.")
        for key, shape in expected.items():
            if self.tensors[key].shape != shape:
                raise ValueError(
                    f"{self.name} has {key!r} of shape {self.tensors[key].shape}, but its config asks for {shape}."
                )
        others = {key: info for key, info in self.tensors.items() if key not in expected}
        stray = [repr(key) for key in others if ".wara_" in key]
        if stray:
            raise ValueError(f"{self.name} holds {first(stray)}, of which its config says nothing.")
        self.unmentioned = {key for key in others if not self._is_known(key)}
        if self.unmentioned:
            names = [repr(key) for key in others if key in self.unmentioned]
            warnings.warn(
                f"{self.name} holds {first(names)}, of which its config says nothing. It is kept, as PEFT loads it "
                "into parameters of that name."
            )
        return others

    def _check_promises(self) -> None:
        """What the config says is trained besides the adapter must be in the file."""
        lacking = [repr(name) for name in self.config.modules_to_save or () if not self._is_saved(name)]
        if lacking:
            raise ValueError(
                f"{self.name} lacks {first(lacking)}, which `modules_to_save` in its config promises. Use a complete "
                "copy of the adapter; if the model has no module of that name, take it out of the config."
            )
        tokens = [key for key in self.others if key.endswith(f".{TOKENS}")]
        if self.config.trainable_token_indices and not tokens:
            raise ValueError(
                f"{self.name} lacks the rows of tokens that `trainable_token_indices` in its config promises. Use a "
                "complete copy of the adapter."
            )
        for key in tokens:
            named, rows = len(self.token_indices(key)), self.others[key].shape[:1]
            if rows != (named,):
                raise ValueError(
                    f"trainable_token_indices of the adapter do not fit {key!r} in {self.name}: they name {named} "
                    f"tokens, and its shape is {self.others[key].shape}."
                )
        if self.config.bias != "none":
            self._check_biases()

    def _is_saved(self, name: str) -> bool:
        """Whether the file has a part of a module that `modules_to_save` names."""
        names: tuple[str, ...] = (name,)
        for task_types, heads in HEADS.items():
            if self.config.task_type in task_types and name in heads:
                names = heads  # PEFT adds all of them to the config, and the model has one
        return any(_is_part_of(key, names) for key in self.others if not PEFT_INTERNAL.search(key))

    def _check_biases(self) -> None:
        """Which biases there are only the base model knows; but layers of one kind all have theirs, or none has."""
        in_full = tuple(self.config.modules_to_save or ())
        biased = {_module_of(key) for key in self.others if key.endswith(".bias") and not _is_part_of(key, in_full)}
        adapted = [name for name, shape in self.modules.items() if shape.kind != "Embedding"]
        kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in adapted if name in biased}
        lacking = [repr(name) for name in adapted if name not in biased and re.sub(r"\.\d+\.", ".*.", name) in kinds]
        if lacking:
            raise ValueError(
                f"{self.name} lacks the bias of {first(lacking)}, but has it of other layers of that name, and "
                f"bias={self.config.bias!r} in its config promises all. Use a complete copy of the adapter."
            )
        if not biased:
            warnings.warn(
                f"bias={self.config.bias!r} in the config says that biases were trained, and {self.name} has none. "
                "Unless the base model has none either, it is not complete."
            )

    def token_indices(self, key: str) -> list[int]:
        """The tokens whose rows are kept under one of the keys in `others`."""
        indices = self.config.trainable_token_indices
        if isinstance(indices, dict):
            module = key.removesuffix(f".token_adapter.{TOKENS}")
            named = [rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")]
            # A layer that is tied to one that is named has its tokens.
            return (named or list(indices.values()))[0]
        return indices or []

    def _expected_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """What the config says of one module's adapter, by key."""
        module, config = self.modules[name], self.config
        ranks = {band: rank for band, rank in config.ranks_of(name).items() if rank}
        if not ranks:
            raise ValueError(f"The config beside {self.name} gives module {name!r} no rank.")
        if config.form == "grid":
            total = next(iter(ranks.values())) if config.shared_grid_pair else sum(ranks.values())
            gain = {f"{name}.wara_gain": (len(ranks), total)} if config.shared_grid_pair else {}
            pair = {
                f"{name}.wara_A.weight": (total, module.in_features),
                f"{name}.wara_B.weight": (module.out_features, total),
            }
            return {**pair, **gain}
        by_level = {level: rank for level, rank in enumerate(config.level_ranks_of(name)) if rank}
        kernel = self.kernels[name] = self._kernel(name, f"{name}.wara_A.level{min(by_level)}")
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

    def _kernel(self, name: str, key: str) -> tuple[int, ...]:
        """Kernel size of a convolution, of which only the file knows; empty for other layers."""
        kind = self.modules[name].kind
        dimensions = int(kind[4]) if re.fullmatch(r"Conv\dd", kind) else 0
        kernel = self.tensors[key].shape[2:] if dimensions and key in self.tensors else ()
        if len(kernel) != dimensions or 0 in kernel:
            raise ValueError(f"{self.name} holds no {dimensions}-d kernel for module {name!r}.")
        return kernel

    def _is_known(self, key: str) -> bool:
        """Whether the config, or PEFT's habit of saving embeddings, explains a key that is not a factor."""
        if _is_part_of(key, tuple(self.config.modules_to_save or ())):
            return True
        parameter = key.rpartition(".")[2]
        if parameter == "bias":
            return self.config.bias != "none"
        if parameter == TOKENS:
            return bool(self.config.trainable_token_indices)
        module = _module_of(key)
        of_embedding = module in self.modules and self.modules[module].kind == "Embedding"
        return parameter == "weight" and (of_embedding or module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)


def _is_part_of(key: str, names: tuple[str, ...]) -> bool:
    """Whether a key belongs to a module of one of these names, or to a part of it; PEFT compares the ends of names."""
    return any(key[: dot.start()].endswith(names) for dot in re.finditer(r"\.", key))


def _module_of(key: str) -> str:
    """The model's name for the module that a key belongs to."""
    return key.rpartition(".")[0].removesuffix(".base_layer").removesuffix(".token_adapter")


def parameter_of(key: str) -> str:
    """The model's name for what is kept in full under a key, or for that whose rows of single tokens are."""
    return re.sub(r"(\.token_adapter)?\.base_layer\.", ".", key).replace(f".token_adapter.{TOKENS}", ".weight")


def module_shapes(config: WaRAConfig, path: Path) -> dict[str, ModuleShape]:
    """The adapted modules that a config, read from that path, describes, in natural order.

    Raises:
        ValueError: there are none, or the description is broken.
    """
    where = f"module_shapes in {str(path)!r}"
    if not isinstance(config.module_shapes, dict) or not config.module_shapes:
        raise ValueError(f"{where} is empty. Load the adapter on its base model and save it again to have it filled.")
    shapes = {}
    for name, entry in sorted(config.module_shapes.items(), key=_natural_order):
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


def _natural_order(item: tuple[str, Any]) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", item[0])]
