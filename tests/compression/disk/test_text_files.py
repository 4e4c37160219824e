"""Files of texts: lines, JSON lines and CSV, and what is wrong with them in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from wara_peft.compression.disk.text_files import read_texts

LONG = "a" * 200_000


@pytest.mark.parametrize(
    ("name", "content", "texts", "labels"),
    [
        ("a.txt", "one\n\n  \ntwo words\n", ["one", "two words"], None),
        ("a", "text,label\none,1\n", ["text,label", "one,1"], None),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two\\nlines", "id": 3}', ["one", "two\nlines"], None),
        ("a.jsonl", '{"text": "one", "label": 0}\n{"text": "two", "label": "x"}', ["one", "two"], [0, "x"]),
        ("a.JSON", '{"text": "a\u2028b", "label": 1}', ["a\u2028b"], [1]),
        ("a.csv", "label,text\r\n1,one\r\n0,two\r\n", ["one", "two"], ["1", "0"]),
        ("a.csv", '\ufefftext,other\n"one, ""two""\nthree",4\n', ['one, "two"\nthree'], None),
        ("a.csv", "text,label\none,\ntwo,\n", ["one", "two"], None),
        ("a.tsv", "text\tlabel\none, two\t1\n", ["one, two"], ["1"]),
    ],
)
def test_reads(tmp_path: Path, name: str, content: str, texts: list[str], labels: list | None) -> None:
    (tmp_path / name).write_bytes(content.encode())
    found = read_texts(tmp_path / name)
    assert (found.texts, found.labels) == (texts, labels)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "has no texts"),
        ("a.jsonl", "", "has no texts"),
        ("a.csv", "text,label\n", "has no texts"),
        ("a.csv", "", "has the columns None, and none of the name 'text'"),
        ("a.csv", "words,label\na,1\n", r"columns \['words', 'label'\]"),
        ("a.csv", "text,label\na,1,2\n", "Line 2 .* another number of values"),
        ("a.csv", "text,label\na\n", "Line 2 .* another number of values"),
        ("a.csv", 'text,label\n"a', "is not CSV"),
        ("a.csv", f"text\n{LONG}", "is not CSV: field larger"),
        ("a.csv", "text,label\na,1\nb,\n", "Only some rows .* line 3"),
        ("a.csv", "text,label\n,1\n", "Line 2 .* has no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "label": 0}', "Only some rows .* line 2"),
        ("a.jsonl", '{"text": "a"}\n[1]', "Line 2 .* no JSON object"),
        ("a.jsonl", '{"text": "a"', "Line 1 .* is not JSON"),
        ("a.jsonl", '{"text": 3}', "Line 1 .* has no text: 'text' is 3"),
        ("a.jsonl", '{"words": "a"}', "Line 1 .* has no text"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_texts(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"text\n\xff\xfe")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_texts(tmp_path / "a.csv")
