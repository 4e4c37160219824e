"""Writes docs/compatibility.md from the table that tests/test_parity.py runs: `python -m docs.compatibility`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.parity import AREAS
from tests.parity.table import WORKS, Row

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """# LoRA and WaRA, feature by feature

WaRA trains in one of two ways: as its own adapter, a `WaRAConfig` in the place of LoraConfig, or inside a LoRA that
somebody makes, by [`reparametrize_lora`](inside_lora.md). Each row is a short check that `pytest tests/test_parity.py`
runs with LoRA and with both, through the same function, and asserts that what is written here comes of it. "refused"
quotes the error, which is raised before anything is changed. "instead" says what to do where WaRAConfig does not work.

Inside LoRA more is checked: outputs and gradients are those of plain LoRA with the same factors, in float64 to 1e-10
(where PyTorch, PEFT or a quantization has no float64, to the precision of its dtype).

Where a row names a test instead, that test shows it. The page is written by `python -m docs.compatibility` from
`tests/parity/`.
"""
HEAD = ["| feature | LoRA | WaRAConfig | inside LoRA | instead |", "|---|---|---|---|---|"]


def page() -> str:
    """The page's text."""
    rows = [row for area in AREAS for row in area.rows if row.check is not None]
    lines = [INTRODUCTION, "## Where only one of the two ways works", ""]
    lines += ["| only as `WaRAConfig` | only inside LoRA |", "|---|---|"]
    lines += [
        f"| {_listed(row for row in rows if row.wara == WORKS != row.inside)} "
        f"| {_listed(row for row in rows if row.inside == WORKS != row.wara)} |",
        "",
    ]
    for area in AREAS:
        lines += [f"## {area.title}", "", *HEAD]
        lines += [_line(row) for row in area.rows]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row) -> str:
    cells = [row.feature, row.lora, row.wara, row.inside, row.instead]
    for index, test in ((2, row.test), (3, row.inside_test)):
        if test is not None:
            cells[index] += f" ([test](../{test}))"
    return f"| {' | '.join(map(_escaped, cells))} |"


def _listed(rows: Iterable[Row]) -> str:
    return "<br>".join(_escaped(row.feature) for row in rows)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
