"""Writes docs/compatibility.md from the table that tests/test_parity.py runs: `python -m docs.compatibility`."""

from __future__ import annotations

from pathlib import Path

from tests.parity import AREAS
from tests.parity.table import Row

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """# LoRA and WaRA, feature by feature

Each row is a short check that `pytest tests/test_parity.py` runs with LoRA and with WaRA, through the same function,
and asserts that what is written here comes of it. Where a row names a test instead, that test shows WaRA. "refused"
quotes the error. The page is written by `python -m docs.compatibility` from `tests/parity/`.
"""


def page() -> str:
    """The page's text."""
    lines = [INTRODUCTION]
    for area in AREAS:
        lines += [f"## {area.title}", "", "| feature | LoRA | WaRA | instead |", "|---|---|---|---|"]
        lines += [_line(row) for row in area.rows]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row) -> str:
    lora, wara = row.lora, row.wara
    if row.test is not None:
        lora, wara = "", f"{wara} ([test](../{row.test}))"
    cells = (row.feature, lora, wara, row.instead)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
