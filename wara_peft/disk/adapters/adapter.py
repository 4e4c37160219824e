"""Reading a saved adapter by itself, without its base model, and without trusting it.

An adapter directory holds `adapter_config.json`, whose `module_shapes` give the dimensions, and
`adapter_model.safetensors`; or, if diffusers saved it, `pytorch_lora_weights.safetensors` with both. Names, shapes and
ranks are compared from the file's header before anything is allocated, values when they are read. Pickles are never
opened.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from torch import Tensor
from transformers.utils import CONFIG_NAME as MODEL_CONFIG

from ...config import WaRAConfig, scaling
from ...forms import Form, Parts, SubbandFactor
from ...layers.low_rank_update import LowRankUpdate, update_of
from ...messages import first_few
from ..checkpoints.checkpoint import read_json
from ..checkpoints.tensors import FLOATS, TensorFile
from .component_file import FILE_NAME, ComponentFile
from .contents import PEFT_PREFIX, WaRAContents, module_shapes

_Config = TypeVar("_Config", bound=PeftConfig)
Track = Callable[[Collection[str]], Iterable[str]]
"""Wraps a loop over names to show its progress, as `rich.progress.track` does."""


class SavedAdapter:
    """A WaRA adapter on disk.

    Args:
        path: the directory that holds `adapter_config.json` and `adapter_model.safetensors`, or, without these,
            `pytorch_lora_weights.safetensors` of diffusers.
        component: which one of a pipeline's components to read, where diffusers saved several in one file.

    Attributes:
        config: its `WaRAConfig`.
        modules: the `ModuleShape` of each adapted module by name, in natural order, layer 2 before layer 10.
        others: shape and dtype of what else it holds (fully trained modules, biases, tokens, embeddings) by key,
            without PEFT's prefix.
        unmentioned: those keys of `others` that the config does not explain.
        component: the component that it is of, where the file says so.

    Raises:
        FileNotFoundError: there is no such directory, or a file is missing.
        ValueError: the adapter is not a WaRA adapter, is saved as a pickle or without its basis, cut short, lacks
            something that its config promises, or contradicts itself.

    Warns:
        UserWarning: it holds what its config does not mention, or no biases where its config says that they train.
    """

    def __init__(self, path: str | os.PathLike[str], component: str | None = None) -> None:
        self.path = Path(path)
        config_path, by_diffusers = self.path / CONFIG_NAME, None
        if not config_path.is_file() and (self.path / FILE_NAME).is_file():
            config_path = self.path / FILE_NAME
            by_diffusers = ComponentFile(config_path, component)
            self.config = parse_config(by_diffusers.config, config_path, "WaRA", WaRAConfig)
        else:
            self.config = read_config(self.path, "WaRA", WaRAConfig)
        self.component = by_diffusers.component if by_diffusers else None
        modules = module_shapes(self.config, config_path)
        if not self.config.save_basis:
            raise ValueError(
                f"The adapter in {str(self.path)!r} was saved without its basis (save_basis=False), which only its "
                "base model can give again: load it on that, and use the model."
            )
        self._file = by_diffusers or open_weights(self.path)
        self._contents = WaRAContents(self.config, modules, self._file)
        self.modules = self._contents.modules
        self.others, self.unmentioned = self._contents.others, self._contents.unmentioned

    @property
    def _form(self) -> Form:
        return self.config.form_object

    @property
    def tied(self) -> bool:
        """Whether the embedding's adapter is shared by layers tied to it, if the model has such layers."""
        return self.config.ensure_weight_tying and any(shape.kind.has_vocabulary for shape in self.modules.values())

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

    def _parts(self, module: str) -> Parts:
        """The parts of an adapted module's adapter, on the CPU."""
        keys = self._contents.factors[module]
        values = {key.removeprefix(f"{module}."): value for key, value in zip(keys, self._read(keys), strict=True)}
        return self._form.with_values(self._contents.parts(module), values)

    def factors(self, module: str) -> tuple[SubbandFactor, SubbandFactor]:
        """The modules that hand out Â and B̂ of an adapted module, on the CPU.

        Raises:
            ValueError: a value is not finite, or the adapter has no ΔW.
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

    def dtype(self, module: str) -> torch.dtype:
        """Dtype of the parameters that train for an adapted module."""
        dtypes = {FLOATS[self._contents.tensors[key].dtype] for key in self._contents.trained[module]}
        return functools.reduce(torch.promote_types, dtypes)

    def scaling(self, module: str) -> float:
        """Factor of B̂ Â in an adapted module."""
        return scaling(self.config.alpha_of(module), self.rank(module), self.config.use_rslora)

    def parameters(self, module: str) -> int:
        """Number of parameters that the adapter trains for an adapted module."""
        return sum(math.prod(self._contents.factors[module][key]) for key in self._contents.trained[module])

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
        shape, factors = self.modules[module], self.factors(module)
        with torch.no_grad():
            factor_a, factor_b = (factor.synthesise(dtype or self.dtype(module)).to(device) for factor in factors)
            return update_of(shape, factor_a, factor_b * self.scaling(module))

    def token_indices(self, key: str) -> list[int]:
        """The tokens whose rows are kept under one of the keys in `others`."""
        return self._contents.token_indices(key)

    def other(self, key: str) -> Tensor:
        """The tensor of one of the keys in `others`."""
        return next(iter(self._read([key])))

    def _read(self, keys: Iterable[str]) -> list[Tensor]:
        return read_finite(self._file, keys)


def no_progress_bar(names: Collection[str]) -> Iterable[str]:
    """A `Track` that shows nothing."""
    return names


def read_config(directory: Path, method: str, config_class: type[_Config]) -> _Config:
    """The config of the adapter in a directory.

    Args:
        directory: the adapter's.
        method: its method's name, which in capitals is PEFT's type.
        config_class: the method's class of configs.

    Raises:
        FileNotFoundError: there is no such directory, or no config.
        ValueError: it is another method's, or broken.
    """
    if not directory.is_dir():
        is_file = ": it is a file; name the directory that it lies in" if directory.exists() else ""
        raise FileNotFoundError(f"There is no adapter directory {str(directory)!r}{is_file}.")
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.{_what_else(directory)}")
    return parse_config(read_json(path), path, method, config_class)


def _what_else(directory: Path) -> str:
    """Say what a directory without an adapter's config holds instead."""
    folders = [repr(str(file.parent)) for file in sorted(directory.glob(f"*/{CONFIG_NAME}"))]
    if folders:  # PEFT saves adapters of other names than "default" so, and Trainer its checkpoints
        return f" Adapters lie in {first_few(folders)}: name one of these."
    if (directory / MODEL_CONFIG).is_file():
        return f" {str(directory)!r} is the directory of a model, not of an adapter."
    return ""


def parse_config(fields: dict[str, Any], path: Path, method: str, config_class: type[_Config]) -> _Config:
    """The config of these fields, which were read from that path; see `read_config`."""
    if fields.get("peft_type") != method.upper():
        found = fields.get("peft_type")
        remedy = " `PeftModel.from_pretrained` loads it as it is." if found in [*PeftType.__members__] else ""
        raise ValueError(f"{str(path)!r} is not of a {method} adapter: its peft_type is {found!r}.{remedy}")
    try:
        config = config_class.from_peft_type(**fields)
    except Exception as error:  # whatever a damaged config leads to
        raise ValueError(f"{str(path)!r}: {type(error).__name__}: {error}") from error
    assert isinstance(config, config_class)
    return config


def open_weights(directory: Path) -> TensorFile:
    """The file of an adapter's tensors.

    Raises:
        FileNotFoundError: it is missing, or a pickle.
        ValueError: it is broken.
    """
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        pickled = directory / WEIGHTS_NAME
        remedy = (
            f"; {str(pickled)!r} is a pickle, which may run any code and is not opened. Load the adapter where "
            "you trust it, and save it again with `safe_serialization=True`."
            if pickled.exists()
            else "."
        )
        raise FileNotFoundError(f"There is no file {str(path)!r}{remedy}")
    return TensorFile(path)


def read_finite(file: TensorFile, keys: Iterable[str]) -> list[Tensor]:
    """The tensors of these keys, which are without PEFT's prefix.

    Raises:
        ValueError: a value is not finite.
    """
    keys = list(keys)
    tensors = file.read(PEFT_PREFIX + key for key in keys)
    for key, tensor in zip(keys, tensors, strict=True):
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{str(file.path)!r} is broken: {key!r} holds values that are not finite. Use an earlier checkpoint."
            )
    return tensors
