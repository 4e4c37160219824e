"""Reading files of texts to calibrate or to evaluate with: plain lines, JSON lines, or CSV, with labels or without."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT, LABEL = "text", "label"
"""The columns of a file with labels."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Texts:
    """The texts of a file.

    Attributes:
        path: the file.
        texts: the texts, none of them empty.
        labels: the label of each text as it stands in the file, or None if the file has no labels.
    """

    path: Path
    texts: list[str]
    labels: list[Any] | None = None


def read_texts(path: Path) -> Texts:
    """Read a file: a text in each line, or by its ending JSON lines or CSV with columns "text" and maybe "label".

    Empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not text, or has no texts; a row has no text; or only some rows have labels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        # A byte-order mark, with which some programs begin a file, belongs to no column's name.
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not text in UTF-8: {error}.") from error
    ending = path.suffix.lower()
    if ending in JSON_LINES:
        found = _checked(path, _json_rows(path, content))
    elif ending in DELIMITERS:
        found = _checked(path, _csv_rows(path, content, DELIMITERS[ending]))
    else:
        found = Texts(path, [line for line in content.splitlines() if line.strip()])
    if not found.texts:
        raise ValueError(f"{str(path)!r} has no texts: give a file with one in each line.")
    return found


Row = tuple[int, dict[str, Any]]
"""The number of a line, and what stands in it by column."""


def _json_rows(path: Path, content: str) -> Iterator[Row]:
    # `splitlines` would also split at separators that may stand inside of a JSON string.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"Line {number} of {str(path)!r} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"Line {number} of {str(path)!r} is no JSON object; write one with {TEXT!r} in each line."
                )
            yield number, row


def _csv_rows(path: Path, content: str, delimiter: str) -> Iterator[Row]:
    # The lines keep their ends, as a quoted text may go on in the next line.
    reader = csv.DictReader(content.splitlines(keepends=True), delimiter=delimiter, strict=True)
    try:
        if TEXT not in (reader.fieldnames or ()):
            raise ValueError(f"{str(path)!r} has the columns {reader.fieldnames}, and none of the name {TEXT!r}.")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"Line {reader.line_num} of {str(path)!r} has another number of values than the first line."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} of {str(path)!r} is not CSV: {error}.") from error


def _checked(path: Path, rows: Iterator[Row]) -> Texts:
    texts: list[str] = []
    labels: list[Any] = []
    for number, row in rows:
        text, label = row.get(TEXT), row.get(LABEL)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Line {number} of {str(path)!r} has no text: {TEXT!r} is {text!r}.")
        texts.append(text)
        if label is not None and label != "":
            labels.append(label)
        if labels and len(labels) < len(texts):
            raise ValueError(f"Only some rows of {str(path)!r} have a {LABEL!r}: give all or none; see line {number}.")
    return Texts(path, texts, labels or None)
