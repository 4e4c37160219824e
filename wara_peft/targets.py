"""What is checked of an adapter before the first module is replaced, and of a saved one when its tensors come."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from .config import WaRAConfig
from .messages import first


def check_adapter_name(adapter_name: str) -> None:
    """Refuse a name that is also that of a parameter.

    Raises:
        ValueError: it is.
    """
    if re.fullmatch(r"([AB]_)?level\d+|[ad][ad]\d+|weight", adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a parameter of WaRA adapters, and saving would write "
            "an empty file. Choose another name."
        )


def check_ranks(config: WaRAConfig, names: Iterable[str]) -> None:
    """Refuse a config that leaves one of the modules without any rank.

    Raises:
        ValueError: it does.
    """
    empty = [repr(name) for name in names if not any(config.ranks_of(name).values())]
    if empty:
        raise ValueError(
            f"rank_pattern leaves every subband out in module {first(empty)}. Give at least one a rank, or leave the "
            "module out with `exclude_modules`."
        )


def check_shapes_of_saved(saved: Mapping[str, list[Any]], found: Mapping[str, list[Any]]) -> None:
    """Compare the modules that a saved adapter belongs to with those that it is being loaded into.

    Args:
        saved, found: `WaRAConfig.module_shapes` of either.

    Raises:
        ValueError: shapes differ.
    """
    different = [
        f"{name!r} (saved {tuple(saved[name][1:3])}, here {tuple(shape[1:3])})"
        for name, shape in found.items()
        if saved.get(name, shape)[1:] != shape[1:]
    ]
    if different:
        raise ValueError(
            f"The saved adapter was made for modules of other (out, in) shapes: {first(different)}. Load it on the "
            "base model it was trained on (with its embeddings resized as they were then)."
        )
    missing = [repr(name) for name in saved if name not in found]
    if missing:
        warnings.warn(
            f"The saved adapter also adapts {first(missing)}, which this model does not have or the config does not "
            "target; that part of it is ignored."
        )


def check_base_weights_of_saved(saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the base weights that a saved adapter without its basis belongs to with those of this model.

    Args:
        saved, found: `WaRAConfig.base_weight_hashes` of either.

    Raises:
        ValueError: they differ.
    """
    different = [repr(name) for name, value in found.items() if saved.get(name, value) != value]
    if different:
        raise ValueError(
            f"The saved adapter was saved with save_basis=False, and its basis comes from other base weights than "
            f"those of module {first(different)}. Load it on the base model it was trained on, in the same dtype and "
            "with the same quantization, or train it with save_basis=True."
        )
