"""Names of modules, and the patterns in a config that stand for them, matched as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

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
        if matches(pattern, module_name, field_name):
            return value
    return default


def matches(pattern: str, module_name: str, field_name: str) -> bool:
    """Whether PEFT takes a module for one that a pattern means, in bounded time.

    Raises:
        ValueError: matching takes too long.
    """
    try:
        return _compiled(rf"(.*\.)?({pattern})$").match(module_name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"{field_name}[{pattern!r}] takes more than {PATTERN_SECONDS} s to match against module "
            f"{module_name!r}. Write it without repetitions inside of repetitions."
        ) from None


def check_in_time(field_name: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuse patterns that take too long to match, also behind the first that does.

    Raises:
        ValueError: one of them does.
    """
    for pattern in patterns:
        if _literal(pattern) is None:
            for name in names:
                matches(pattern, name, field_name)


class Unseen(dict[str, _Value]):
    """Patterns that look like an empty dict to PEFT.

    It matches patterns by `re`, for which a limit of time cannot be set, and only to warn of those that match nothing.
    """

    def __bool__(self) -> bool:
        return False


@contextmanager
def patterns_unseen(config: Any) -> Iterator[None]:
    """Scope in which PEFT does not see a config's patterns."""
    before: dict[str, Any] = {name: getattr(config, name) for name in ("rank_pattern", "alpha_pattern")}
    for name, patterns in before.items():
        setattr(config, name, Unseen(patterns))
    try:
        yield
    finally:
        for name, patterns in before.items():
            now = getattr(config, name)
            setattr(config, name, patterns if now == patterns else dict(now))


NEGATED = "^(?!"
"""How a pattern begins that `in_any_order` has made of another one."""


def in_any_order(
    field_name: str, patterns: Mapping[str, _Value], names: Collection[str] | None = None
) -> dict[str, _Value]:
    r"""Patterns that mean in any order what the given ones mean by the first that matches.

    PEFT sorts the keys of what it writes. So a pattern gets the negations in front of those before it that match one
    of its modules and have another value: `{"layers.1.q": 1, "q": 2}` becomes
    `{"layers.1.q": 1, "^(?!(?:.*\.)?(?:layers.1.q)$)(?:.*\.)?(?:q)": 2}`.

    Args:
        field_name: the config's name for the patterns.
        patterns: a value for each pattern.
        names: names of the modules that they are for, or None where these are not known.
    """
    result: dict[str, _Value] = {}
    before: list[str] = []
    for pattern, value in patterns.items():
        of_one_module = _named_module(pattern) is not None
        others = [
            other
            for other in before
            if patterns[other] != value
            and not (of_one_module and _named_module(other) is not None)
            and _overlap(field_name, other, pattern, names)
        ]
        # PEFT lets any path stand before a pattern. `^` makes that path empty, and `(?:.*\.)?` takes its place.
        changed = rf"^{''.join(map(_negation, others))}(?:.*\.)?(?:{pattern})"
        result[changed if others else pattern] = value
        before.append(pattern)
    return result


def _negation(pattern: str) -> str:
    return rf"(?!(?:.*\.)?(?:{pattern})$)"


def _overlap(field_name: str, one: str, other: str, names: Collection[str] | None) -> bool:
    """Whether two patterns match the same module; without names, whether they may."""
    if _negation(one) in other or _negation(other) in one:
        return False
    literals = _literal(one), _literal(other)
    if literals[0] is not None and literals[1] is not None:
        return matches(one, literals[1], field_name) or matches(other, literals[0], field_name)
    return names is None or any(matches(one, name, field_name) and matches(other, name, field_name) for name in names)


@lru_cache(maxsize=4096)
def _named_module(pattern: str) -> str | None:
    """The one module that a pattern made by `exact_pattern` names, or None for others."""
    name = re.sub(r"\\(.)", r"\1", pattern[1:])
    return name if pattern == exact_pattern(name) else None


def _literal(pattern: str) -> str | None:
    """The name that a pattern without repetitions and alternatives spells, or None."""
    return _named_module(pattern) or (pattern if re.fullmatch(r"[\w.-]+", pattern) else None)


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
