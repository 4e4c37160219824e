"""Tables between markers, in files that are otherwise written by hand."""

from __future__ import annotations

from pathlib import Path


def replaced(path: Path, tables: dict[str, str]) -> str:
    """The file's text with each table between the markers of its name."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text
