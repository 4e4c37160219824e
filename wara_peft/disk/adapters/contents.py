"""Compares the tensors that an adapter's config promises with those in its file, by reading only the file's header."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn

from ...base_layers.kinds import KINDS, ModuleShape
from ...config import WaRAConfig
from ...forms import Parts
from ...layers.base import TENSOR_PARTS
from ...messages import first_few
from ..checkpoints.tensors import FLOATS, INTEGERS, TensorFile, TensorInfo

PEFT_PREFIX = "base_model.model."
TOKENS = "trainable_tokens_delta"
"""The last part of the key under which PEFT saves the rows of the tokens in `trainable_token_indices`."""
HEADS = {("SEQ_CLS", "TOKEN_CLS"): ("classifier", "score"), ("QUESTION_ANS",): ("qa_outputs",)}
"""By task type, the names of heads that PEFT adds to `modules_to_save`."""
PEFT_INTERNAL = re.compile(r"\.(modules_to_save|original_module)\.")
"""Matches keys that carry PEFT's inner names. With `bias="all"` PEFT saves the biases of a module that is trained in
full twice: under the module's name, and under these inner names."""


class Contents:
    """The tensors of an adapter's file, sorted into factors of adapted modules and other tensors.

    A subclass says which factors a module has in its method (WaRA or LoRA).

    Args:
        config: the adapter's configuration, of WaRA or LoRA.
        modules: the adapted modules by name.
        file: the adapter's file.

    Attributes:
        modules: the adapted modules by name.
        tensors: shape and dtype of every tensor in the file, by key without PEFT's prefix.
        factors: for each adapted module, the shapes of the tensors of its adapter, by key without PEFT's prefix.
        trained: for each adapted module, the keys in `factors` whose tensors train.
        others: shape and dtype of all tensors that are not in `factors`, by key.
        unmentioned: the keys of `others` that the config does not explain.

    Raises:
        ValueError: the file lacks something, or holds what it must not.

    Warns:
        UserWarning: the file holds tensors that the config does not mention, or no biases though biases train.
    """

    parts_of_layers: tuple[str, ...]
    """Names of the parts that hold a layer's factors. If a key has such a name and the config does not explain it,
    the file is refused."""

    def __init__(self, config: WaRAConfig | LoraConfig, modules: dict[str, ModuleShape], file: TensorFile) -> None:
        self.config, self.modules = config, modules
        self.name = repr(str(file.path))
        self.tensors = self._check_dtypes(file)
        self.factors: dict[str, dict[str, tuple[int, ...]]] = {}
        self.trained: dict[str, list[str]] = {}
        for module in modules:
            self.factors[module], self.trained[module] = self._factors_of(module)
        self.others = self._check_keys()
        self._check_promises()

    def _factors_of(self, module: str) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """Shapes of an adapted module's tensors by key, and the keys of those that train."""
        raise NotImplementedError

    def _check_dtypes(self, file: TensorFile) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor in the file, by key without PEFT's prefix, after a check of the dtypes."""
        found = {}
        for key, info in file.tensors.items():
            if not key.startswith(PEFT_PREFIX):
                raise ValueError(f"{self.name} has the key {key!r}, which does not start with {PEFT_PREFIX!r}.")
            # A module that trains in full may have integers: a batch norm counts its batches.
            self._check_dtype(key, info, (*FLOATS, *INTEGERS))
            found[key.removeprefix(PEFT_PREFIX)] = info
        return found

    def _check_dtype(self, key: str, info: TensorInfo, allowed: Iterable[str]) -> None:
        if info.dtype not in allowed:
            raise ValueError(f"{self.name} has {key!r} of dtype {info.dtype}; one of {', '.join(FLOATS)} is allowed.")

    def _check_keys(self) -> dict[str, TensorInfo]:
        """Check the file's keys and shapes against the config, and return the tensors that are not factors."""
        expected = {key: shape for of_module in self.factors.values() for key, shape in of_module.items()}
        missing = [repr(key) for key in expected if key not in self.tensors]
        if missing:
            raise ValueError(f"{self.name} lacks {first_few(missing)}, which its config asks for.")
        for key, shape in expected.items():
            self._check_dtype(key, self.tensors[key], FLOATS)
            if self.tensors[key].shape != shape:
                raise ValueError(
                    f"{self.name} has {key!r} of shape {self.tensors[key].shape}, but its config asks for {shape}."
                )
        others = {key: info for key, info in self.tensors.items() if key not in expected}
        self.unmentioned = {key for key in others if not self._is_known(key)}
        stray = [repr(key) for key in others if key in self.unmentioned and self._looks_like_a_factor(key)]
        if stray:
            raise ValueError(f"{self.name} holds {first_few(stray)}, of which its config says nothing.")
        if self.unmentioned:
            names = [repr(key) for key in others if key in self.unmentioned]
            warnings.warn(
                f"{self.name} holds {first_few(names)}, of which its config says nothing. It is kept, as PEFT loads "
                "it into parameters of that name."
            )
        return others

    def _check_promises(self) -> None:
        """Check that the file has the modules, tokens and biases that train besides the adapter by its config."""
        lacking = [repr(name) for name in self.config.modules_to_save or () if not self._is_saved(name)]
        if lacking:
            raise ValueError(
                f"{self.name} lacks {first_few(lacking)}, which `modules_to_save` in its config promises. Use a "
                "complete copy of the adapter; if the model has no module of that name, take it out of the config."
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
                names = heads  # PEFT adds all these names to the config, but a model has a head of only one of them
        return any(_is_part_of(key, names) for key in self.others if not PEFT_INTERNAL.search(key))

    def _check_biases(self) -> None:
        """Check that the file has the biases that the config names.

        A config that version 0.1.0 saved has no `biased_modules`, so which layers have a bias can only be guessed: a
        bias is missing if a layer lacks it that the same layer of another block has.
        """
        in_full = tuple(self.config.modules_to_save or ())
        there = {parameter_of(key) for key in self.others if key.endswith(".bias") and not _is_part_of(key, in_full)}
        missing = [
            name
            for name, shape in self.modules.items()
            if (places := shape.biases_of(name)) and there.isdisjoint(places)
        ]
        named = getattr(self.config, "biased_modules", None)  # a LoRA has no such field
        if named is not None:
            lacking = [repr(name) for name in missing if name in named]
            if lacking:
                raise ValueError(
                    f"{self.name} lacks the bias of {first_few(lacking)}, which trained with "
                    f"bias={self.config.bias!r}. Use a complete copy of the adapter."
                )
            return
        kinds = {_of_one_kind(name) for name in self.modules if name not in missing}
        lacking = [repr(name) for name in missing if _of_one_kind(name) in kinds]
        if lacking:
            raise ValueError(
                f"{self.name} lacks the bias of {first_few(lacking)}, but has it of other layers of that name, and "
                f"bias={self.config.bias!r} in its config promises all. Use a complete copy of the adapter."
            )
        if missing:
            warnings.warn(
                f"bias={self.config.bias!r} in the config says that biases were trained, and {self.name} has none of "
                f"{first_few(list(map(repr, missing)))}. Unless the base model has none there "
                "either, it is not complete."
            )

    def token_indices(self, key: str) -> list[int]:
        """The indices of the tokens whose trained rows the tensor `others[key]` holds."""
        indices = self.config.trainable_token_indices
        if isinstance(indices, dict):
            module = key.removesuffix(f".token_adapter.{TOKENS}")
            named = [rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")]
            # The config need not name a layer that is tied to the embedding. It has the tokens of the named layer.
            return (named or list(indices.values()))[0]
        return indices or []

    def _looks_like_a_factor(self, key: str) -> bool:
        """Whether a key ends in the name of a part that holds factors, or in such a name and a parameter's name."""
        return any(part in self.parts_of_layers for part in key.split(".")[-2:])

    def _is_known(self, key: str) -> bool:
        """Whether the config explains a key that is not a factor's, or the key is an embedding's weight.

        PEFT saves the embeddings' weights without being told so, if they are targets or the vocabulary was resized.
        """
        if _is_part_of(key, tuple(self.config.modules_to_save or ())):
            return True
        parameter = key.rpartition(".")[2]
        if parameter == "bias":
            return self.config.bias != "none"
        if parameter == TOKENS:
            return bool(self.config.trainable_token_indices)
        module = _module_of(key)
        is_vocabulary = module in self.modules and self.modules[module].kind.has_vocabulary
        return parameter == "weight" and (is_vocabulary or module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)


class WaRAContents(Contents):
    """The tensors of a WaRA adapter's file.

    Attributes:
        modules: the adapted modules by name. The config does not hold kernel sizes, so those of convolutions are
            taken from the file.
    """

    config: WaRAConfig
    parts_of_layers = TENSOR_PARTS

    def parts(self, module: str) -> Parts:
        """The parts that the adapter of a module has by its config, on the meta device."""
        config = self.config
        with torch.device("meta"):
            return config.form_object.create(config, module, self.modules[module], config.ranks_of(module))

    def _factors_of(self, module: str) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        self.modules[module] = self._with_kernel(module, self.modules[module])
        saved = self.config.form_object.saved(self.parts(module))
        tensors = {f"{module}.{key}": value for key, value in saved.items()}
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return shapes, [key for key, tensor in tensors.items() if isinstance(tensor, nn.Parameter)]

    def _with_kernel(self, name: str, shape: ModuleShape) -> ModuleShape:
        """A module's shape with the kernel size, read from the shape of one of its factors A in the file."""
        if not any(self.config.ranks_of(name).values()):
            raise ValueError(f"The config beside {self.name} gives module {name!r} no rank.")
        dimensions = shape.kind.kernel_dimensions
        if not dimensions:
            return shape
        key = next(key for key in self.config.form_object.saved(self.parts(name)) if key.startswith("wara_A."))
        info = self.tensors.get(f"{name}.{key}")
        kernel = () if info is None else info.shape[2:]
        if len(kernel) != dimensions or 0 in kernel:
            raise ValueError(f"{self.name} holds no {dimensions}-d kernel for module {name!r}.")
        return replace(shape, kernel=kernel)


def _of_one_kind(module: str) -> str:
    """Replace the block's number in a module's name, so that modules of one kind in all blocks have one name."""
    return re.sub(r"\.\d+\.", ".*.", module)


def _is_part_of(key: str, names: tuple[str, ...]) -> bool:
    """Whether a key belongs to a module of one of these names, or to a module inside one.

    As PEFT does, it takes a name for a module's if the module's full name ends in it.
    """
    return any(key[: dot.start()].endswith(names) for dot in re.finditer(r"\.", key))


def _module_of(key: str) -> str:
    """The model's name for the module that a key belongs to."""
    return key.rpartition(".")[0].removesuffix(".base_layer").removesuffix(".token_adapter")


def parameter_of(key: str) -> str:
    """The model's name of the parameter (or buffer) whose values, or rows of single tokens, a key holds."""
    return re.sub(r"(\.token_adapter)?\.base_layer\.", ".", key).replace(f".token_adapter.{TOKENS}", ".weight")


def module_shapes(config: WaRAConfig, path: Path) -> dict[str, ModuleShape]:
    """The adapted modules that a config describes, in natural order: layer 2 comes before layer 10.

    Args:
        config: the adapter's.
        path: the file that it was read from, to be named in errors.

    Raises:
        ValueError: the config describes no modules, or a description is broken.
    """
    where = f"module_shapes in {str(path)!r}"
    if not config.module_shapes:
        raise ValueError(f"{where} is empty. Load the adapter on its base model and save it again to have it filled.")
    shapes = {}
    for name, (kind, *sizes) in sorted(config.module_shapes.items(), key=natural_order):
        if kind not in KINDS:
            raise ValueError(f"{where} names the kind {kind!r} for {name!r}; it is one of {', '.join(KINDS)}.")
        shapes[name] = ModuleShape.of_list(KINDS[kind], sizes)
        if KINDS[kind].is_parameter != (len(sizes) > 3) or KINDS[kind].has_experts != (shapes[name].experts > 0):
            entry = [kind, *sizes]
            raise ValueError(f"{where} has {entry!r} for {name!r}, which are not the numbers of such a kind.")
        if shapes[name].out_features % shapes[name].groups:
            entry = [kind, *sizes]
            raise ValueError(f"{where} has {entry!r} for {name!r}, whose groups do not divide its out channels.")
    return shapes


def natural_order(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """A sort key for items of a dict by their names, in which runs of digits compare as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", item[0])]
