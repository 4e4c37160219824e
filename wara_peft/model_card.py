"""The section of a saved adapter's model card that says how to load it."""

from __future__ import annotations

import re
from pathlib import Path

HEADING = "## Loading this WaRA adapter"
SECTION = f"""{HEADING}

WaRA comes with the package `wara-peft`. Import it before loading, or PEFT stops with `KeyError: 'WARA'`:

```python
# pip install wara-peft
import wara_peft
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("path or name of this adapter")
```
"""


def add_loading_section(save_directory: str) -> None:
    """Add the section, once, to the model card of the adapter in that directory.

    PEFT writes the card of a `PeftModel` before its configuration, so it is there already: in the directory itself, or
    above it, since adapters not called "default" are saved in folders below one card for all. Where there is neither
    (transformers' own `save_pretrained`), a short card is made.
    """
    path = Path(save_directory) / "README.md"
    above = path.parent.parent / "README.md"
    if not path.exists() and re.search(r"^library_name: *peft$", _text(above), re.MULTILINE):
        path = above
    text = _text(path) or "---\nlibrary_name: peft\n---\n"
    if HEADING not in text:
        path.write_text(f"{text.rstrip()}\n\n{SECTION}", encoding="utf-8", errors="surrogateescape")


def _text(path: Path) -> str:
    """What the file says, bytes that are no text included, or nothing where there is no file."""
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
