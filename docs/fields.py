"""Writes docs/fields.md from the docstring of `WaRAConfig`: `python -m docs.fields`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from peft import PeftConfig

from wara_peft import WaRAConfig

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Fields of `WaRAConfig`

In Python they are arguments, `WaRAConfig(r=4, target_modules="all-linear")`; `HfArgumentParser(WaRAConfig)` makes
options of them, `--r 4 --target_modules all-linear`, with lists of indices and dicts as JSON. Fields that every PEFT
config has, such as `task_type`, are there too. [Targets and forms](targets_and_forms.md) shows ranks by subband and by
module.

The table is written by `python -m docs.fields` from the docstring of the class, as the help of command lines is.

| field | default | meaning |
|---|---|---|
"""


def page() -> str:
    """The page's text."""
    return INTRODUCTION + "".join(
        f"| `{item.name}` | `{_default(item)!r}` | {item.metadata['help'].replace('|', chr(92) + '|')} |\n"
        for item in dataclasses.fields(WaRAConfig)
        if item.name not in PeftConfig.__dataclass_fields__
    )


def _default(item: dataclasses.Field[object]) -> object:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
