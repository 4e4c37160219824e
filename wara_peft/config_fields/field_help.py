"""Makes the help of each field of a config from the docstring of its class, so that it is written only once."""

from __future__ import annotations

import dataclasses
import re
from types import MappingProxyType
from typing import TypeVar

_Class = TypeVar("_Class", bound=type)


def with_help(cls: _Class) -> _Class:
    """Give each field of the dataclass `cls` the text under "Args:" of its docstring as `metadata["help"]`.

    Parsers of command lines, such as `HfArgumentParser`, show this text. Fields that the docstring does not name, such
    as inherited ones, keep their metadata. Under `python -OO`, which drops docstrings, all fields keep it.
    """
    descriptions = described(cls.__doc__ or "")
    for item in dataclasses.fields(cls):
        if item.name in descriptions:
            # A field's metadata is read-only, so it is replaced as a whole.
            item.metadata = MappingProxyType({**item.metadata, "help": descriptions[item.name]})
    return cls


def described(docstring: str) -> dict[str, str]:
    """Map each name in the section "Args:" of a docstring in Google's style to its description, in one line."""
    section = re.search(r"^( *)Args:\n((?:\1 .*\n|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(rf"^{section[1]} {{4}}(\w+): (.*\n(?:{section[1]} {{5}}.*\n)*)", section[2], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
