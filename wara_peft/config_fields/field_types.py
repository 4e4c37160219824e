"""Checks the values of a dataclass against its annotations, and reads values that are JSON on a command line.

A command line has only strings. `HfArgumentParser` gives each field one argument. Its type is the first one in the
annotation that the parser can call; a union with a string type in second place becomes a string. So fields that hold
dicts or lists, which a command line can spell only as JSON, have `Json` in second place.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NoReturn,
    Optional,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

_JSON = "JSON on a command line"
if TYPE_CHECKING:
    Json = NoReturn  # a type checker sees only the other types, since `read_json` replaces the string
else:
    Json = Annotated[Optional[str], _JSON]  # noqa: UP045  # a parser drops None, and takes what comes second then
"""The second type in a field's annotation, if its value may be written as JSON. `read_json` reads it."""


def read_json(instance: Any) -> None:
    """Replace strings in a dataclass's fields by the JSON that they hold. Fields without `Json` take only lists."""
    annotations = _annotations(instance.__class__)
    for item in dataclasses.fields(instance):
        value, annotation = getattr(instance, item.name), annotations[item.name]
        if not isinstance(value, str):
            continue
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            continue
        if _takes_json(annotation) or (isinstance(read, list) and _matches(read, annotation)):
            setattr(instance, item.name, read)


@cache
def _annotations(cls: type) -> dict[str, Any]:
    """Evaluate a class's annotations once, as this takes nearly all of the time in which an instance is made."""
    return get_type_hints(cls, include_extras=True)  # without extras the marker of `Json` is lost


def _takes_json(annotation: Any) -> bool:
    return any(_JSON in getattr(part, "__metadata__", ()) for part in get_args(annotation))


def check_types(instance: Any) -> None:
    """Check the value of every field of a dataclass, which may come from a JSON file or a command line.

    A bool is no int, an int is a float, a tuple or a set counts as a list, and a string stands for an enum's member.

    Raises:
        TypeError: a value is of another type than its field.
        ValueError: a field takes one of several strings, and has another string.
    """
    annotations = _annotations(instance.__class__)
    for item in dataclasses.fields(instance):
        value, annotation = getattr(instance, item.name), annotations[item.name]
        if not _matches(value, annotation):
            constants = [constant for part in _alternatives(annotation) for constant in _constants(part)]
            wrong_value = isinstance(value, str) and any(isinstance(constant, str) for constant in constants)
            error = ValueError if wrong_value else TypeError
            raise error(f"{item.name}={value!r} must be {_described(annotation)}.")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(part for part in parts if _JSON not in getattr(part, "__metadata__", ()))


def _constants(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _matches(value: Any, annotation: Any) -> bool:
    return any(_matches_one(value, part) for part in _alternatives(annotation))


def _matches_one(value: Any, annotation: Any) -> bool:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(constant) and value == constant for constant in args)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(args) and all(map(_matches, value, args))
    if origin is list:
        return isinstance(value, (list, tuple, set)) and all(_matches(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _matches(key, args[0]) and _matches(item, args[1]) for key, item in value.items()
        )
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(annotation, enum.Enum):
        return isinstance(value, str)
    return isinstance(value, annotation)


_NAMES = {bool: "True or False", int: "an int", float: "a number", str: "a string", dict: "a dict"}
_PLURALS: dict[Any, str] = {int: "ints", float: "numbers", str: "strings"}


def _described(annotation: Any) -> str:
    return " or ".join(map(_described_one, _alternatives(annotation)))


def _described_one(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple:
        return f"({', '.join(map(_described, args))})"
    if origin is list:
        return f"a list of {_plural(args[0])}"
    if origin is dict:
        return f"a dict from {_plural(args[0])} to {_plural(args[1])}"
    return "None" if annotation is type(None) else _NAMES.get(annotation, f"a {annotation.__name__}")


def _plural(annotation: Any) -> str:
    return " or ".join(_PLURALS.get(part) or _described_one(part) for part in _alternatives(annotation))
