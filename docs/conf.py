"""Settings of Sphinx: `python -m sphinx -W --keep-going -n docs OUT` builds the site, with warnings as errors."""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

import wara_peft

project = "wara-peft"
author = project_copyright = "The wara-peft developers"
release = version = wara_peft.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
html_title = f"wara-peft {release}"

# Docstrings write code in single backquotes, as Markdown does.
default_role = "code"
# Quotation marks are code as often as not: "haar".
smartquotes = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
# Links to headings, by the names that they have on code hosts too.
myst_heading_anchors = 3

# With -n every type that is not found is an error. Those of other packages are on sites that a build without network
# cannot read; the last ones are internal, and no page describes them.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|peft|collections|os|pathlib|numpy|matplotlib)\..+"),
    ("py:class", r"wara_peft\.(forms\.base\.Form|layers\.base\.WaRALayer|attention\.projected\.ProjectedAttention)"),
]

DOCS = Path(__file__).parent
PAGES = {
    match[1]: page.name
    for page in DOCS.glob("*.md")
    if (match := re.match(r"```{include} (\S+)", page.read_text(encoding="utf-8")))
}
"""Files outside of docs/ that are pages of the site: those include them."""


def setup(app: Sphinx) -> None:
    app.connect("source-read", lambda app, name, source: _to_pages(source, (DOCS / name).parent, (DOCS / name).parent))
    app.connect("include-read", lambda app, path, name, source: _to_pages(source, (DOCS / path).parent, DOCS))


def _to_pages(source: list[str], folder: Path, of_page: Path) -> None:
    """Make the links of a file in `folder`, which are written for code hosts, those of a page in `of_page`."""

    def link(match: re.Match[str]) -> str:
        path = os.path.relpath(folder / match[1], DOCS)
        return f"]({os.path.relpath(DOCS / PAGES.get(path, path), of_page)}"

    source[0] = re.sub(r"\]\((?![a-z]+:|#)([^)#]+)", link, source[0])
