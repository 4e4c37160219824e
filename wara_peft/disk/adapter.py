"""Reading a saved adapter by itself, without its base model, and without trusting it.

An adapter directory holds `adapter_config.json`, whose `module_shapes` give the dimensions, and
`adapter_model.safetensors`. Names, shapes and ranks are compared from the file's header before anything is allocated,
values when they are read. Pickles are never opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import WaRAConfig, scaling
from ..forms import Form, Parts, SubbandFactor
from ..kinds import KINDS, ModuleShape
from ..low_rank_update import LowRankUpdate
from ..messages import first
from .checkpoint import read_json

PEFT_PREFIX = "base_model.model."
Track = Callable[[Collection[str]], Iterable[str]]
"""Wraps a loop over names to show its progress, as `rich.progress.track` does."""


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
        if not self.config.save_basis:
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
        shapes = self._shapes_in_file()
        self.modules = {name: self._with_kernel(name, shapes) for name in self.modules}
        self._expected = {name: self._expected_shapes(name) for name in self.modules}
        self.others = self._check_keys(shapes)

    @property
    def _form(self) -> Form:
        return self.config.form_object

    @cached_property
    def tied(self) -> bool:
        """Whether the embedding's adapter may be shared by layers tied to it."""
        return self.config.ensure_weight_tying and any(
            shape.kind is KINDS["Embedding"] for shape in self.modules.values()
        )

    def check_has_delta_weight(self, module: str) -> None:
        """Refuse an adapter whose change of the output no weight can make.

        Raises:
            ValueError: it has a form without ΔW.
        """
        if not self._form.has_delta_weight:
            raise ValueError(
                f"The adapter in {str(self.path)!r} has form={self.config.form!r}, and in module {module!r} it mixes "
                "tokens, which no weight of a layer can do: it has no ΔW, and cannot be merged or converted to LoRA. "
                "Serve it unmerged."
            )

    def _empty_parts(self, module: str) -> Parts:
        """An adapted module's parts, on the meta device."""
        with torch.device("meta"):
            return self._form.create(self.config, module, self.modules[module], self.config.ranks_of(module))

    def _parts(self, module: str) -> Parts:
        """An adapted module's parts with their values, on the CPU."""
        parts = self._empty_parts(module)
        keys = list(self._form.saved(parts))
        tensors = self._read(f"{module}.{key}" for key in keys)
        return self._form.with_values(parts, dict(zip(keys, tensors, strict=True)))

    def factors(self, module: str) -> tuple[SubbandFactor, SubbandFactor]:
        """The modules that hand out Â and B̂ of an adapted module, on the CPU.

        Raises:
            ValueError: a value is not finite, or the adapter has no ΔW (`form="grid"`).
        """
        self.check_has_delta_weight(module)
        return self._form.factors(self._parts(module))

    @torch.no_grad()
    def coefficients(self, module: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A_s, (r_s, n_j, *kernel), and scaling · B_s, (m_j, r_s), of each subband of an adapted module."""
        scale = self.scaling(module)
        pairs = self._form.coefficients(self._parts(module))
        return {name: (rows, columns * scale) for name, (rows, columns) in pairs.items()}

    def rank(self, module: str) -> int:
        """R of an adapted module: the rank of its adapter between x and the result."""
        return self._form.total_rank(self.config, self.config.ranks_of(module))

    def scaling(self, module: str) -> float:
        """Factor of B̂ Â in an adapted module."""
        return scaling(self.config.alpha_of(module), self.rank(module), self.config.use_rslora)

    def parameters(self, module: str) -> int:
        """Number of parameters that the adapter trains for an adapted module."""
        return self._form.trained_parameters(self._empty_parts(module))

    def weight_shape(self, module: str) -> tuple[int, ...]:
        """Shape in which the base model keeps the weight of an adapted module."""
        return self.modules[module].weight_shape

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
        if not self.config.module_shapes:
            raise ValueError(
                f"{where} is empty. Load the adapter on its base model and save it again to have it filled."
            )
        shapes = {}
        for name, (kind, *sizes) in sorted(self.config.module_shapes.items(), key=_natural_order):
            if kind not in KINDS:
                raise ValueError(f"{where} names the kind {kind!r} for {name!r}; it is one of {', '.join(KINDS)}.")
            shapes[name] = ModuleShape(KINDS[kind], *sizes)
            if shapes[name].out_features % shapes[name].groups:
                raise ValueError(
                    f"{where} has {[kind, *sizes]!r} for {name!r}, whose groups do not divide its out channels."
                )
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

    def _with_kernel(self, name: str, shapes: dict[str, tuple[int, ...]]) -> ModuleShape:
        """The shape of a module with the kernel size of a convolution, which only the file knows."""
        module = self.modules[name]
        if not any(self.config.ranks_of(name).values()):
            raise ValueError(f"The config in {str(self.path)!r} gives module {name!r} no rank.")
        if not module.kind.kernel_dimensions:
            return module
        key = next(key for key in self._form.saved(self._empty_parts(name)) if key.startswith("wara_A."))
        kernel = shapes.get(f"{name}.{key}", ())[2:]
        if len(kernel) != module.kind.kernel_dimensions:
            raise ValueError(
                f"{str(self._file)!r} holds no {module.kind.kernel_dimensions}-d kernel for module {name!r}."
            )
        return replace(module, kernel=kernel)

    def _expected_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """What the config says of one module's adapter, by key."""
        tensors = self._form.saved(self._empty_parts(name))
        return {f"{name}.{key}": tuple(tensor.shape) for key, tensor in tensors.items()}

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
        of_embedding = module in self.modules and self.modules[module].kind is KINDS["Embedding"]
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
