"""Reads a saved adapter without its base model, and without trusting the adapter's files.

PEFT saves an adapter as a directory with two files: `adapter_config.json`, whose `module_shapes` give the dimensions
of the adapted layers, and `adapter_model.safetensors`. Diffusers saves one file, `pytorch_lora_weights.safetensors`,
which holds the tensors and, in its metadata, the config. `SavedAdapter` compares names, shapes and ranks with the
config from the file's header, before it allocates anything, and checks values when it reads them. It never opens a
pickle, which could run any code.
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
            the file `pytorch_lora_weights.safetensors` that diffusers wrote.
        component: the component of a pipeline ("unet", "text_encoder") whose adapter to read, if diffusers saved the
            adapters of several components in one file.

    Attributes:
        config: its `WaRAConfig`.
        modules: the `ModuleShape` of each adapted module by name, in natural order, layer 2 before layer 10.
        others: shape and dtype of all other tensors in the file (fully trained modules, biases, tokens, embeddings),
            by key without PEFT's prefix.
        unmentioned: the keys of `others` that the config does not explain.
        component: the component of a pipeline that the adapter belongs to, if the file names it.

    Raises:
        FileNotFoundError: there is no such directory, or a file is missing, or the tensors are saved as a pickle.
        ValueError: the adapter is not a WaRA adapter, was saved without its basis, is cut short, lacks something that
            its config promises, or contradicts itself.

    Warns:
        UserWarning: the file holds tensors that the config does not mention, or holds no biases though the config says
            that biases train.
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
        """Refuse an adapter if no change of a layer's weight (ΔW) has the adapter's effect.

        Raises:
            ValueError: the adapter's form has no ΔW.
        """
        if not self._form.has_delta_weight:
            raise ValueError(
                f"The adapter in {str(self.path)!r} has form={self.config.form!r}, and in module {module!r} it mixes "
                "tokens, which no weight of a layer can do: it has no ΔW, and cannot be merged or converted to LoRA. "
                "Serve it unmerged."
            )

    def _parts(self, module: str) -> Parts:
        """The parts (factors and basis) that form the adapter of a module, on the CPU."""
        keys = self._contents.factors[module]
        values = {key.removeprefix(f"{module}."): value for key, value in zip(keys, self._read(keys), strict=True)}
        return self._form.with_values(self._contents.parts(module), values)

    def factors(self, module: str) -> tuple[SubbandFactor, SubbandFactor]:
        """The two modules that compute the factors Â and B̂ of an adapted module from its subbands, on the CPU.

        Raises:
            ValueError: a value in the file is not finite, or the adapter has no ΔW.
        """
        self.check_has_delta_weight(module)
        return self._form.factors(self._parts(module))

    @torch.no_grad()
    def coefficients(self, module: str) -> dict[str, tuple[Tensor, Tensor]]:
        """The trained factors of each subband s of an adapted module, by the subband's name.

        The first is A_s, of shape (r_s, n_j, *kernel); the second is scaling · B_s, of shape (m_j, r_s).
        """
        scale = self.scaling(module)
        pairs = self._form.coefficients(self._parts(module))
        return {name: (rows, columns * scale) for name, (rows, columns) in pairs.items()}

    def rank(self, module: str) -> int:
        """R of an adapted module: the rank of its Â and B̂, to which all subbands contribute."""
        return self._form.total_rank(self.config, self.config.ranks_of(module))

    def dtype(self, module: str) -> torch.dtype:
        """Dtype of the parameters that train for an adapted module."""
        dtypes = {FLOATS[self._contents.tensors[key].dtype] for key in self._contents.trained[module]}
        return functools.reduce(torch.promote_types, dtypes)

    def scaling(self, module: str) -> float:
        """The number by which an adapted module multiplies B̂ Â."""
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
            dtype: dtype to compute in; None means the dtype of the parameters in the file.
            device: device of the result.
        """
        shape, factors = self.modules[module], self.factors(module)
        with torch.no_grad():
            factor_a, factor_b = (factor.synthesise(dtype or self.dtype(module)).to(device) for factor in factors)
            return update_of(shape, factor_a, factor_b * self.scaling(module))

    def token_indices(self, key: str) -> list[int]:
        """The indices of the tokens whose trained rows the tensor `others[key]` holds."""
        return self._contents.token_indices(key)

    def other(self, key: str) -> Tensor:
        """Read the tensor that `others` lists under this key."""
        return next(iter(self._read([key])))

    def _read(self, keys: Iterable[str]) -> list[Tensor]:
        return read_finite(self._file, keys)


def no_progress_bar(names: Collection[str]) -> Iterable[str]:
    """A `Track` that shows nothing."""
    return names


def read_config(directory: Path, method: str, config_class: type[_Config]) -> _Config:
    """The config of the adapter in a directory.

    Args:
        directory: the adapter's directory.
        method: name of the adapter's method; in capitals it is the `peft_type` in the config.
        config_class: the class of the method's configs.

    Raises:
        FileNotFoundError: there is no such directory, or it has no config.
        ValueError: the config is broken, or belongs to another method.
    """
    if not directory.is_dir():
        is_file = ": it is a file; name the directory that it lies in" if directory.exists() else ""
        raise FileNotFoundError(f"There is no adapter directory {str(directory)!r}{is_file}.")
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.{_what_else(directory)}")
    return parse_config(read_json(path), path, method, config_class)


def _what_else(directory: Path) -> str:
    """A sentence for an error: what a directory without an adapter's config holds instead; empty if unknown."""
    folders = [repr(str(file.parent)) for file in sorted(directory.glob(f"*/{CONFIG_NAME}"))]
    # PEFT saves an adapter that is not named "default" in a folder of its name; Trainer saves checkpoints in folders.
    if folders:
        return f" Adapters lie in {first_few(folders)}: name one of these."
    if (directory / MODEL_CONFIG).is_file():
        return f" {str(directory)!r} is the directory of a model, not of an adapter."
    return ""


def parse_config(fields: dict[str, Any], path: Path, method: str, config_class: type[_Config]) -> _Config:
    """Make a config from the fields that were read from a path. `read_config` documents arguments and errors."""
    if fields.get("peft_type") != method.upper():
        found = fields.get("peft_type")
        remedy = " `PeftModel.from_pretrained` loads it as it is." if found in [*PeftType.__members__] else ""
        raise ValueError(f"{str(path)!r} is not of a {method} adapter: its peft_type is {found!r}.{remedy}")
    try:
        config = config_class.from_peft_type(**fields)
    except Exception as error:  # a damaged config can fail anywhere in PEFT's code, with any error
        raise ValueError(f"{str(path)!r}: {type(error).__name__}: {error}") from error
    assert isinstance(config, config_class)
    return config


def open_weights(directory: Path) -> TensorFile:
    """Open the file of an adapter's tensors.

    Raises:
        FileNotFoundError: the file is missing, or the tensors are saved as a pickle.
        ValueError: the file is broken.
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
    """Read the tensors of these keys, which are given without PEFT's prefix.

    Raises:
        ValueError: a value is not finite.
    """
    keys = list(keys)
    tensors = file.read(PEFT_PREFIX + key for key in keys)
    for key, tensor in zip(keys, tensors, strict=True):
        if not torch.isfinite(tensor).all():
            # One NaN in a factor would spread over a whole weight, and show only much later, in the model's outputs.
            raise ValueError(
                f"{str(file.path)!r} is broken: {key!r} holds values that are not finite. Use an earlier checkpoint."
            )
    return tensors
