"""Matches the patterns in a config against names of modules, as PEFT does, but in bounded time."""

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
    """Make a key of `rank_pattern` or `alpha_pattern` that names one module, and none whose name only ends like it."""
    return f"^{re.escape(module_name)}"


def suffix_matches(targets: Iterable[str], names: Iterable[str]) -> str | None:
    """Find the modules that PEFT would adapt besides these targets, because it compares the ends of names.

    Args:
        targets: full names of modules.
        names: names of all modules of the model.

    Returns:
        A regular expression for `exclude_modules` that matches these modules; None if there are none.
    """
    targets = set(targets)
    ends = tuple(f".{target}" for target in targets)
    return "|".join(re.escape(name) for name in names if name.endswith(ends) and name not in targets) or None


_Value = TypeVar("_Value")


def value_for(module_name: str, field_name: str, patterns: Mapping[str, _Value], default: _Value) -> _Value:
    """Return the value of the first pattern that matches a module, as PEFT's `get_pattern_key` chooses it."""
    for pattern, value in patterns.items():
        if matches(pattern, module_name, field_name):
            return value
    return default


def matches(pattern: str, module_name: str, field_name: str) -> bool:
    """Whether a pattern matches a module, as PEFT decides it, in bounded time.

    Raises:
        ValueError: matching takes too long.
    """
    # Python's `re` has no limit of time, and a pattern from a downloaded config could keep it busy for ever.
    try:
        return _compiled(rf"(.*\.)?({pattern})$").match(module_name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"{field_name}[{pattern!r}] takes more than {PATTERN_SECONDS} s to match against module "
            f"{module_name!r}. Write it without repetitions inside of repetitions."
        ) from None


def check_in_time(field_name: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuse patterns that take too long to match. All are tried, also those behind the first that matches.

    Raises:
        ValueError: a pattern takes too long.
    """
    for pattern in patterns:
        if _literal(pattern) is None:
            for name in names:
                matches(pattern, name, field_name)


class Unseen(dict[str, _Value]):
    """A dict of patterns that looks empty to PEFT.

    PEFT matches patterns by `re`, for which no limit of time can be set. It does so only to warn of patterns that
    match nothing.
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
            # Injection may have changed the patterns meanwhile, and that change stays.
            now = getattr(config, name)
            setattr(config, name, patterns if now == patterns else dict(now))


NEGATED = "^(?!"
"""Start of the patterns that `in_any_order` makes."""


def in_any_order(
    field_name: str, patterns: Mapping[str, _Value], names: Collection[str] | None = None
) -> dict[str, _Value]:
    r"""Rewrite patterns, of which the first match counts, so that their order has no effect.

    PEFT sorts keys when it writes a config. So a pattern gets negations in front: one for each earlier pattern that
    matches one of its modules and has another value. `{"layers.1.q": 1, "q": 2}` becomes
    `{"layers.1.q": 1, "^(?!(?:.*\.)?(?:layers.1.q)$)(?:.*\.)?(?:q)": 2}`.

    Args:
        field_name: the config's name for the patterns.
        patterns: a value for each pattern.
        names: names of the modules that the patterns are for; None if these are not known.
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
    # One that this file has rewritten already, as in a config that was saved and loaded, excludes the other.
    if _negation(one) in other or _negation(other) in one:
        return False
    literals = _literal(one), _literal(other)
    if literals[0] is not None and literals[1] is not None:
        return matches(one, literals[1], field_name) or matches(other, literals[0], field_name)
    return names is None or any(matches(one, name, field_name) and matches(other, name, field_name) for name in names)


@lru_cache(maxsize=4096)
def _named_module(pattern: str) -> str | None:
    """Return the one module that a pattern made by `exact_pattern` names; None for other patterns."""
    name = re.sub(r"\\(.)", r"\1", pattern[1:])
    return name if pattern == exact_pattern(name) else None


def _literal(pattern: str) -> str | None:
    """Return the name that a pattern without repetitions and alternatives spells; None for other patterns."""
    return _named_module(pattern) or (pattern if re.fullmatch(r"[\w.-]+", pattern) else None)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def check_pattern(where: str, pattern: str) -> None:
    """Refuse a pattern that is no regular expression.

    Args:
        where: the pattern's place in the config, for the message.
        pattern: the pattern.

    Raises:
        ValueError: it is no regular expression.
    """
    # PEFT compiles it by `re`, and `matches` by `regex`: it must be valid for both.
    try:
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where} is not a valid regular expression: {error}.") from error
