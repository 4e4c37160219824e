"""Names of modules, and the patterns in a config that stand for them, matched as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

import regex

PATTERN_SECONDS = 1.0
"""How long matching one pattern against one name may take."""


def exact_pattern(module_name: str) -> str:
    """The key of `rank_pattern` and `alpha_pattern` that names one module, and no other whose name ends as its."""
    return f"^{re.escape(module_name)}"


def suffix_matches(targets: Iterable[str], names: Iterable[str]) -> str | None:
    """Modules that PEFT would also take for these targets, as it compares the ends of names.

    Args:
        targets: full names of modules.
        names: names of all modules of the model.

    Returns:
        A regular expression of those that are not targets themselves, for `exclude_modules`, or None.
    """
    targets = set(targets)
    ends = tuple(f".{target}" for target in targets)
    return "|".join(re.escape(name) for name in names if name.endswith(ends) and name not in targets) or None


_Value = TypeVar("_Value")


def value_for(module_name: str, field_name: str, patterns: Mapping[str, _Value], default: _Value) -> _Value:
    """The value of the first pattern that PEFT's `get_pattern_key` would find for a module, in bounded time."""
    for pattern, value in patterns.items():
        try:
            if _compiled(rf"(.*\.)?({pattern})$").match(module_name, timeout=PATTERN_SECONDS):
                return value
        except TimeoutError:
            raise ValueError(
                f"{field_name}[{pattern!r}] takes more than {PATTERN_SECONDS} s to match against module "
                f"{module_name!r}. Write it without repetitions inside of repetitions."
            ) from None
    return default


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def check_pattern(where: str, pattern: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        ValueError: it is none; `where` says what of the config it is.
    """
    try:
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where} is not a valid regular expression: {error}.") from error
