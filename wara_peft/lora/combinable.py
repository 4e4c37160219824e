"""Opens saved adapters that are to be combined, and refuses what cannot be, from configs and headers of files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft.utils import CONFIG_NAME

from ..base_layers.kinds import ModuleShape
from ..disk.adapters.adapter import SavedAdapter
from ..disk.adapters.contents import natural_order, parameter_of
from ..disk.adapters.lora_modules import SavedLoraModules
from ..disk.checkpoints.checkpoint import read_json
from ..layers.as_lora import common_rank
from ..messages import first_few

Saved = SavedAdapter | SavedLoraModules
"""A saved adapter, of WaRA or LoRA."""


def open_adapter(path: str | os.PathLike[str]) -> Saved:
    """Open a saved adapter that can be combined with others.

    Raises:
        FileNotFoundError: the directory or a file is missing, or the tensors are saved as a pickle.
        ValueError: the adapter is neither WaRA nor LoRA, is damaged, is a variant such as DoRA, trained something in
            full, or adapts what has no weighted sum.
    """
    config = Path(path, CONFIG_NAME)
    is_lora = config.is_file() and read_json(config).get("peft_type") == "LORA"
    saved = SavedLoraModules(path) if is_lora else SavedAdapter(path)
    in_full = {
        "modules_to_save": saved.config.modules_to_save,
        "bias": None if saved.config.bias == "none" else saved.config.bias,
        "trainable_token_indices": saved.config.trainable_token_indices,
    }
    trained = [f"{name}={value!r}" for name, value in in_full.items() if value]
    if trained:
        raise ValueError(
            f"The adapter in {str(path)!r} has {trained[0]}: what was trained in full is no part of a combination. "
            "Combine adapters that were trained without it, or merge this one."
        )
    for name, shape in saved.modules.items():
        _check_module(saved, name, shape)
    return saved


def _check_module(saved: Saved, name: str, shape: ModuleShape) -> None:
    where = f"The adapter in {str(saved.path)!r} adapts {name!r}"
    if isinstance(saved, SavedAdapter):
        saved.check_has_delta_weight(name)
    if shape.kind.is_parameter:
        raise ValueError(
            f"{where}, a bare parameter ({shape.kind.name}), whose adapters cannot be combined. Load them on the base "
            "model and activate several at once (`base_model.set_adapter([...])`), or merge one after the other."
        )
    if shape.kind.is_factorized:
        raise ValueError(
            f"{where}, a factorised layer, beside which PEFT loads no LoRA. Load the adapters on the compressed "
            "model, and combine them by `add_weighted_adapter`."
        )
    if shape.kind.has_vocabulary and saved.config.ensure_weight_tying:
        raise ValueError(
            f"{where} with ensure_weight_tying=True, and only the base model tells which layers share this adapter. "
            "Load the adapters on it, and combine them by `add_weighted_adapter`."
        )


def lora_ranks(saved: Saved) -> dict[str, int]:
    """Give the rank that each module has in the adapter's LoRA; a WaRA adapter's LoRA has one rank for all."""
    if isinstance(saved, SavedLoraModules):
        return {name: saved.rank(name) for name in saved.modules}
    pairs = [(saved.rank(name) * shape.groups, shape.groups) for name, shape in saved.modules.items()]
    return dict.fromkeys(saved.modules, common_rank(pairs))


def common_modules(adapters: Sequence[Saved]) -> dict[str, ModuleShape]:
    """Give the shapes of all modules that one of the adapters has, in natural order.

    Raises:
        ValueError: two adapters have one module in different sizes.

    Warns:
        UserWarning: by their configs, the adapters were trained on base models of different names.
    """
    found: dict[str, tuple[Saved, ModuleShape]] = {}
    for saved in adapters:
        for name, shape in saved.modules.items():
            other, known = found.setdefault(name, (saved, shape))
            if _sizes(known) != _sizes(shape):
                raise ValueError(
                    f"{name!r} is a {known.kind.name} of sizes (out, in) {_sizes(known)[0]} in {str(other.path)!r}, "
                    f"and a {shape.kind.name} of {_sizes(shape)[0]} in {str(saved.path)!r}: the adapters were trained "
                    "on different base models. Combine adapters of one."
                )
    bases = {saved.config.base_model_name_or_path or "": saved for saved in adapters}
    bases.pop("", None)
    if len(bases) > 1:
        # The same model has many names: a directory may have moved, or be the copy of a repository.
        named = [f"{str(saved.path)!r} on {base!r}" for base, saved in bases.items()]
        warnings.warn(
            f"By their configs, the adapters were trained on base models of different names ({first_few(named)}). The "
            "combination has a meaning only if these are the same model."
        )
    return {name: shape for name, (_, shape) in sorted(found.items(), key=natural_order)}


def _sizes(shape: ModuleShape) -> tuple[tuple[int, ...], int, bool]:
    """What must be equal in two adapters of one module. A layer that was quantized may have another kind."""
    return (*shape.lengths, *shape.kernel), shape.groups, shape.kind.has_vocabulary


def frozen_weights(
    adapters: Sequence[Saved], modules: Mapping[str, ModuleShape]
) -> dict[str, list[tuple[Saved, str]]]:
    """Find the weights of the base model that PEFT has saved beside adapters of embeddings, or of a new vocabulary.

    Returns:
        For each weight, by its key in a LoRA of these modules: the adapters that hold it, and its key in each.

    Raises:
        ValueError: two adapters hold one weight in different shapes.
    """
    found: dict[str, list[tuple[Saved, str]]] = {}
    for saved in adapters:
        for own in saved.others:
            module, _, name = parameter_of(own).rpartition(".")
            key = f"{module}.base_layer.{name}" if module in modules else f"{module}.{name}"
            holders = found.setdefault(key, [])
            holders.append((saved, own))
            other, known = holders[0]
            if other.others[known].shape != saved.others[own].shape:
                raise ValueError(
                    f"{str(other.path)!r} and {str(saved.path)!r} hold {own!r} in different shapes: the adapters were "
                    "trained on base models of different vocabularies. Combine adapters of one base model."
                )
    return found
