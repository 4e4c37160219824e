"""Whether the values of a dataclass are of the types that its annotations name: the one table is the class itself.

Command lines hold strings. `HfArgumentParser` makes one argument of a field, of the first type that it finds and can
call, and of a union with strings in second place it makes a string: `Json` is what stands there.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
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
    Json = NoReturn  # what has been read is of one of the other types
else:
    Json = Annotated[Optional[str], _JSON]  # noqa: UP045  # a parser drops None, and takes what then comes second
"""In an annotation, second: the field's value may be written as JSON, which `read_json` reads."""


def read_json(instance: Any) -> None:
    """In a dataclass's fields, replace strings by what they are as JSON: any where `Json` is taken, else lists."""
    annotations = get_type_hints(type(instance), include_extras=True)
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


def _takes_json(annotation: Any) -> bool:
    return any(_JSON in getattr(part, "__metadata__", ()) for part in get_args(annotation))


def check_types(instance: Any) -> None:
    """Check every field of a dataclass, for values that come from elsewhere, such as a JSON file.

    A bool is no int, an int is a float, a list may be a tuple or a set, and a string stands for an enum's member.

    Raises:
        TypeError: a value is of another type than its field.
        ValueError: a field that takes one of several constants has another value of their type.
    """
    annotations = get_type_hints(type(instance), include_extras=True)
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
