"""README and docs: links lead somewhere, and generated pages are what they are generated from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import fields

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "benchmarks").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
OF_THE_PROJECT = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")]
"""What these name besides links, tests/test_project.py checks."""


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Names of the headings, as code hosts make them: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES + OF_THE_PROJECT, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose(path)):
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.is_file(), f"{target} is not there"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^([\w/]+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages - {"index"})


def test_the_page_of_examples_has_every_script():
    scripts = {
        path.name for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
    }
    listed = re.findall(
        r"^\| \[(\w+\.py)\]", (ROOT / "docs" / "examples.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(scripts)


def test_the_page_of_fields_is_the_docstring():
    assert fields.PAGE.read_text(encoding="utf-8") == fields.page(), "run python -m docs.fields"
