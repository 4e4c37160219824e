"""Checks the arguments of public functions: users often swap neighbours of different kinds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

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
        name: the argument's name.
        value: its value.
        kind: what the value must be, in words; a key of `_IS`.

    Raises:
        TypeError: the value is of another kind.
    """
    if not _IS[kind](value):
        raise TypeError(f"{call}: {name} must be {kind}, and is {short_form(value)}.")


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a wrapper that keeps the model as its `module`, for adapters and names are those of the model inside.

    Raises:
        TypeError: the model is wrapped, for example by `nn.DataParallel`, DDP or DeepSpeed.
    """
    inner = getattr(model, "module", None)
    has_adapters = isinstance(inner, nn.Module) and hasattr(inner, "peft_config") and not hasattr(model, "peft_config")
    if has_adapters or isinstance(model, (DataParallel, DistributedDataParallel)):
        raise TypeError(
            f"The model is a {type(model).__name__} around a {type(inner).__name__}: pass the model inside, "
            "`model.module`."
        )


def check_whole_number(
    name: str, value: Any, least: int = 1, most: int | None = None, *, of: str = "", fraction: str = ""
) -> None:
    """Refuse a rank, or another number of things, that is no int or out of range. True and 2.0 are no ints here.

    Args:
        name: the argument's name.
        value: its value.
        least, most: the least and the largest value that is allowed; None is no limit.
        of: words that the message adds after the value, as " of module 'up'".
        fraction: the meaning of a float in (0, 1] in place of an int. If this is empty, floats are refused.

    Raises:
        TypeError: the value is no int, nor a float where one is allowed.
        ValueError: the value is out of its range.
    """
    # numpy's numbers are no float and no int, but Real and Integral.
    is_fraction = bool(fraction) and isinstance(value, Real) and not isinstance(value, Integral)
    is_number = is_fraction or (isinstance(value, Integral) and not isinstance(value, bool))
    largest = math.inf if most is None else most
    if not is_number or not (0 < value <= 1 if is_fraction else least <= value <= largest):
        allowed = f"an int of at least {least}" if most is None else f"an int from {least} to {most}"
        further = f", or a float in (0, 1]: {fraction}" if fraction else ""
        raise (ValueError if is_number else TypeError)(f"{name}={short_form(value)}{of} must be {allowed}{further}.")


def short_form(value: object) -> str:
    """Write a value for a message: a number or a name in full, any other value by its class."""
    # Python raises an error for the digits of an int that is too long.
    if isinstance(value, int) and value.bit_length() > 64:
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1}…"
    if value is None or isinstance(value, (str, os.PathLike, Real)):
        return repr(value)
    return f"a {type(value).__name__}"
