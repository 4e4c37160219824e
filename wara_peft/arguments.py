"""Checks of public functions' arguments: one of a wrong kind was often swapped with its neighbour."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real

from torch import Tensor, nn

_IS: dict[str, Callable[[object], bool]] = {
    "an nn.Module": lambda value: isinstance(value, nn.Module),
    "a str or os.PathLike": lambda value: isinstance(value, (str, os.PathLike)),
    "an nn.Module or a path": lambda value: isinstance(value, (nn.Module, str, os.PathLike)),
    "a torch.Tensor": lambda value: isinstance(value, Tensor),
    "a str": lambda value: isinstance(value, str),
    "a number": lambda value: isinstance(value, Real) and not isinstance(value, bool),
    "an int": lambda value: isinstance(value, Integral) and not isinstance(value, bool),
    "a mapping": lambda value: isinstance(value, Mapping),
    # Any iterable may give batches. A mapping is one batch itself, and iterating over it would give its keys.
    "an iterable of batches": lambda value: (
        not isinstance(value, (Mapping, str, Real, nn.Module)) and value is not None
    ),
}


def check_argument(call: str, name: str, value: object, kind: str) -> None:
    """Refuse an argument that is not of its kind.

    Args:
        call: the function with its first arguments in their order, as "compress(model, budget)".
        name: the argument's.
        value: what was given.
        kind: what it must be, in words, one of the above.

    Raises:
        TypeError: it is of another kind.
    """
    if not _IS[kind](value):
        raise TypeError(f"{call}: {name} must be {kind}, and is {shown(value)}.")


def shown(value: object) -> str:
    """The value where it is short, as numbers and names are, or else its class."""
    if value is None or isinstance(value, (str, os.PathLike, bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"
