"""Reads a LoRA that PEFT has saved, so that it can be trained further as a WaRA adapter; its files are not trusted.

A module's lora_A and lora_B become the two factors of the subband `aa0`, which is the whole matrix without a wavelet
transform. WaRA names these parameters `wara_A.level0` and `wara_B.level0`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import cast

from peft import LoraConfig
from torch import Tensor

from ...arguments import check_whole_number
from ...base_layers.kinds import ModuleShape
from ...config_fields.name_patterns import value_for
from ...messages import first_few
from ..checkpoints.tensors import TensorFile, TensorInfo
from .adapter import open_weights, read_config, read_finite
from .contents import PEFT_INTERNAL, PEFT_PREFIX, TOKENS, Contents, parameter_of

VARIANTS = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "megatron_config",
)
"""Fields of `LoraConfig` that make a variant of LoRA, which adds something other than scaling · x Aᵀ Bᵀ to a module's
result, or adapts something other than modules. A LoRA with one of them is refused."""
CHANGING_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of the values of `init_lora_weights` with which PEFT changes the base model's weights before training.
Such a LoRA does not fit the unchanged base model."""

LARGEST = sys.float_info.max
"""Bound for alphas: comparing with it refuses infinity, NaN, and ints that no float can hold."""


class SavedLora:
    """A LoRA on disk.

    Args:
        path: the directory that holds `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        config: its `LoraConfig`.

    Raises:
        FileNotFoundError: there is no such directory, or a file is missing, or the tensors are saved as a pickle.
        ValueError: the adapter is not a LoRA, is cut short, or is a variant that WaRA does not have.
        TypeError: a rank in its config is not an int.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = read_config(self.path, "LoRA", LoraConfig)
        self._check_numbers()
        self._check_variant()
        self._file = open_weights(self.path)

    def _check_numbers(self) -> None:
        where = f"The LoRA in {str(self.path)!r} has"
        ranks, alphas = self.config.rank_pattern or {}, self.config.alpha_pattern or {}
        if not isinstance(ranks, dict) or not isinstance(alphas, dict):
            raise ValueError(f"{where} rank_pattern={ranks!r} and alpha_pattern={alphas!r}; dicts were expected.")
        named = {f"rank_pattern[{pattern!r}]": rank for pattern, rank in ranks.items()}
        for name, rank in {"r": self.config.r, **named}.items():
            check_whole_number(name, rank, of=f" of the LoRA in {str(self.path)!r}")
        for alpha in (self.config.lora_alpha, *alphas.values()):
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) <= LARGEST:
                raise ValueError(f"{where} an alpha of {alpha!r}; a finite number was expected.")

    def _check_variant(self) -> None:
        for name in VARIANTS:
            value = getattr(self.config, name, None)
            if value:
                raise ValueError(
                    f"The LoRA in {str(self.path)!r} has {name}={value!r}, and so is not only scaling · B A of "
                    "modules: merge it by PEFT, and add a new adapter to the merged model."
                )
        how = self.config.init_lora_weights
        if isinstance(how, str) and how.lower().startswith(CHANGING_THE_BASE):
            raise ValueError(
                f"The LoRA in {str(self.path)!r} has init_lora_weights={how!r}, which changed the base weights when "
                "its training began: merge it by PEFT, or save it with `path_initial_model_for_weight_conversion`."
            )

    def state_dict(
        self,
        modules: dict[str, ModuleShape],
        tied: Set[str],
        in_full: Set[str],
        model_shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Tensor]:
        """All tensors of the LoRA, under the keys of a WaRA adapter.

        Args:
            modules: the modules of the model that the LoRA's config targets, with the kernel sizes of convolutions.
            tied: names of layers that share an embedding's adapter. PEFT saves the adapter under their names as well.
            in_full: keys of all parameters and buffers in the modules that `modules_to_save` matches in the model.
            model_shapes: shapes of the model's parameters and buffers by name.

        Raises:
            ValueError: the LoRA was trained on another base model, or a tensor is missing, is one too many, has
                another shape, or is not finite.

        Warns:
            UserWarning: the file holds tensors that the config does not mention, or no biases though biases train.
        """
        self._check_base(modules, model_shapes)
        contents = LoraContents(self.config, modules, tied, self._file)
        self._check_others(contents, in_full, model_shapes)
        keys = list(contents.tensors)
        values = dict(zip(keys, read_finite(self._file, keys), strict=True))
        for module, shape in modules.items():
            for name, lora_name in zip(("wara_A.level0", "wara_B.level0"), shape.kind.lora_names, strict=True):
                tensor = values.pop(f"{module}.{lora_name}")
                # LoRA's B of a convolution is a weight with a kernel of size one, and WaRA's is a matrix.
                values[f"{module}.{name}"] = tensor.flatten(1) if name.startswith("wara_B") else tensor
        return {PEFT_PREFIX + key: value for key, value in values.items()}

    def _check_base(self, modules: dict[str, ModuleShape], model_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a LoRA if the model lacks its modules, or has them in other sizes.

        This runs before the exact comparison in `Contents`, to name the likely mistake: another base model.
        """
        held: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, info in self._file.tensors.items():
            module, found, name = key.removeprefix(PEFT_PREFIX).partition(".lora_")
            if found:
                held.setdefault(module.replace(".base_layer", ""), {})[f"lora_{name}"] = info.shape
        known = {name[: dot.start()] for name in model_shapes for dot in re.finditer(r"\.", name)}
        absent = [repr(module) for module in held if module not in known]
        differences = [f"it adapts {first_few(absent)}, which this model lacks"] if absent else []
        sizes = []
        for module, shape in modules.items():
            rows, columns = (held.get(module, {}).get(name, ()) for name in shape.kind.lora_names)
            if len(rows) < 2 or len(columns) < 2 or rows[0] != columns[1]:
                continue  # the file itself is damaged, which `Contents` reports
            there, here = (columns[0], *rows[1:]), (shape.out_features, shape.in_features, *shape.kernel)
            if there != here:
                sizes.append(f"{module!r} (there {there}, here {here})")
        if sizes:
            differences.append(f"sizes (out, in) differ in {first_few(sizes)}")
        recorded = self.config.base_model_name_or_path
        origin = f", {recorded!r} by its config" if recorded else ""
        if differences:
            raise ValueError(
                f"The LoRA in {str(self.path)!r} was trained on another base model{origin}: "
                f"{'; '.join(differences)}. Load it on that model, with its embeddings resized as then."
            )
        lacking = [repr(module) for module in modules if module not in held]
        if lacking:
            raise ValueError(
                f"The LoRA in {str(self.path)!r} lacks all of {first_few(lacking)}, which its config means in this "
                f"model. Either it was trained on another base model{origin}, or its file is not complete."
            )

    def _check_others(
        self, contents: Contents, in_full: Set[str], model_shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Check that the model has each tensor that is not a factor, and that the file has whole modules."""
        missing = [repr(name) for name in sorted(in_full - contents.others.keys())]
        if missing:
            raise ValueError(
                f"{contents.name} lacks {first_few(missing)}, which is part of what `modules_to_save` means in this "
                "model. Load it on the model it was trained on."
            )
        for key, info in contents.others.items():
            if PEFT_INTERNAL.search(key):
                continue
            name = parameter_of(key)
            if name not in model_shapes:
                raise ValueError(f"{contents.name} has {key!r}, and the model has no {name!r}.")
            # Rows of single tokens share only the other dimensions with the embedding.
            rows = 1 if key.endswith(f".{TOKENS}") else 0
            if info.shape[rows:] != model_shapes[name][rows:]:
                raise ValueError(
                    f"{contents.name} has {key!r} of shape {info.shape}, but in the model {name!r} is of "
                    f"{model_shapes[name]}. Load it on the model it was trained on, with embeddings resized as then."
                )


class LoraContents(Contents):
    """The tensors of a LoRA's file."""

    config: LoraConfig
    parts_of_layers = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def __init__(self, config: LoraConfig, modules: dict[str, ModuleShape], tied: Set[str], file: TensorFile) -> None:
        self.tied = tied  # before `super`, whose checks read it
        super().__init__(config, modules, file)

    def _check_dtypes(self, file: TensorFile) -> dict[str, TensorInfo]:
        """Leave out the copies of an embedding's adapter that PEFT saves under the names of tied layers."""
        found = super()._check_dtypes(file)
        repeated = tuple(f"{name}.{part}" for name in self.tied for part in self.parts_of_layers)
        return {key: info for key, info in found.items() if not key.startswith(repeated)}

    def _factors_of(self, module: str) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        shape = self.modules[module]
        rank = value_for(module, "rank_pattern", cast(Mapping[str, int], self.config.rank_pattern), self.config.r)
        key_a, key_b = (f"{module}.{name}" for name in shape.kind.lora_names)
        ones = (1,) * len(shape.kernel)
        shapes = {
            key_a: (rank, shape.in_features, *shape.kernel),
            key_b: (shape.out_features, rank, *ones),
        }
        return shapes, list(shapes)
