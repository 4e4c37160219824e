"""Fields of a config are described once, in the docstring of its class: `help` of each field is what stands there."""

from __future__ import annotations

import dataclasses
import re
from types import MappingProxyType
from typing import TypeVar

_Class = TypeVar("_Class", bound=type)


def with_help(cls: _Class) -> _Class:
    """Give each field of the dataclass `cls` the text under "Args:" of its docstring as `metadata["help"]`.

    Parsers of command lines, such as `HfArgumentParser`, show it. Fields that the docstring does not name, such as
    inherited ones, keep theirs, and all do under `python -OO`, where there are no docstrings.
    """
    descriptions = described(cls.__doc__ or "")
    for item in dataclasses.fields(cls):
        if item.name in descriptions:
            item.metadata = MappingProxyType({**item.metadata, "help": descriptions[item.name]})
    return cls


def described(docstring: str) -> dict[str, str]:
    """What the section "Args:" of a docstring in Google's style says of each name, each in one line."""
    section = re.search(r"^( *)Args:\n((?:\1 .*\n|\n)+)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(rf"^{section[1]} {{4}}(\w+): (.*\n(?:{section[1]} {{5}}.*\n)*)", section[2], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
