"""Fields that `WaRAConfig` had in 0.1.0 and has no more: saved configs still name them, new ones must not."""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any, TypeVar

REMOVED = ("ordered_dropout", "component_order", "rank_penalty")
"""Fields of nested adapters, which acted in training only. The tensors are those of `form="subband"`."""

_Class = TypeVar("_Class", bound=type)


def without_removed_fields(cls: _Class) -> _Class:
    """Let the constructor of a config take `REMOVED` fields from a saved config, where it drops them.

    It warns if one of them was set. PEFT passes `peft_type` with the fields that it read from a file; without it the
    fields come from a user, who gets a TypeError.
    """
    init: Any = cls.__init__  # type: ignore[misc]

    @wraps(init)  # PEFT reads the names of fields off the signature
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
