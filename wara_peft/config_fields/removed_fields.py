"""Handles fields that `WaRAConfig` had only in 0.1.0: saved configs may name them, new ones must not."""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any, TypeVar

REMOVED = ("ordered_dropout", "component_order", "rank_penalty")
"""Fields of nested adapters. They acted only in training; the saved tensors are those of `form="subband"`."""

_Class = TypeVar("_Class", bound=type)


def without_removed_fields(cls: _Class) -> _Class:
    """Let the constructor of a config drop `REMOVED` fields that come from a saved config.

    It warns if one of them was set. PEFT passes `peft_type` together with fields that it read from a file. If
    `peft_type` is missing, the fields come from a user, who gets a TypeError.
    """
    init: Any = cls.__init__  # type: ignore[misc]

    @wraps(init)  # keeps the signature, from which PEFT reads the names of fields
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        dropped = {name: kwargs.pop(name) for name in REMOVED if name in kwargs}
        if dropped and "peft_type" not in kwargs:
            raise TypeError(
                f"{cls.__name__} has no field {next(iter(dropped))!r}: nested adapters were removed after 0.1.0. Find "
                "ranks by `wara_peft.allocate_ranks`, or export a trained adapter at a lower rank by "
                "`wara_peft.save_as_lora(path, model, rank=k)`."
            )
        set_names = [name for name, value in dropped.items() if value]
        if set_names:
            warnings.warn(
                f"The saved adapter sets {', '.join(set_names)}, with which wara-peft 0.1.0 ordered components in "
                "training: this release drops that, and the adapter computes what it did."
            )
        init(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls
