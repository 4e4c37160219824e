"""The section of a saved adapter's model card that says how to load it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

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
    if path.exists():
        card = ModelCard.load(path)
    elif _is_peft_card(above):
        path, card = above, ModelCard.load(above)
    else:
        card = ModelCard("---\nlibrary_name: peft\n---\n")
    if HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{SECTION}"
        card.save(path)


def _is_peft_card(path: Path) -> bool:
    return path.exists() and ModelCard.load(path).data.library_name == "peft"
