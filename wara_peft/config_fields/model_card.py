"""Adds to a saved adapter's model card a tag, and a section that says how to load the adapter."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from huggingface_hub import metadata_load, metadata_save

HEADING = "## Loading this WaRA adapter"
TAG = "wara"
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
"""PEFT's class that loads an adapter with its base model, by task type. For adapters without one: `AutoPeftModel`."""


def section(task_type: str | None) -> str:
    """Write the section, with the class that loads an adapter of that task type."""
    auto_class = AUTO_CLASSES.get(str(getattr(task_type, "value", task_type)), "AutoPeftModel")
    return f"""{HEADING}

WaRA comes with the package `wara-peft`: `pip install .` in a copy of its repository. Import it before loading, or PEFT
stops with `KeyError: 'WARA'`:

```python
import wara_peft
from peft import {auto_class}

model = {auto_class}.from_pretrained("path or name of this adapter")
```
"""


def add_loading_section(save_directory: str, task_type: str | None) -> None:
    """Add the section and the tag, once, to the model card of the adapter in that directory.

    PEFT writes the card of a `PeftModel` before it writes the config, so the card exists already. It is in the
    directory itself, or in the one above: adapters that are not called "default" are saved in folders of their own,
    below one card for all. If there is no card, as after transformers' own `save_pretrained`, this makes a short one.
    It does not change a README that is no card of PEFT's.
    """
    path = Path(save_directory) / "README.md"
    above = path.parent.parent / "README.md"
    if not path.exists() and _is_card(above):
        path = above
    if path.exists() and not _is_card(path):
        return
    text = _text(path) or "---\nlibrary_name: peft\n---\n"
    if HEADING not in text:
        path.write_text(f"{text.rstrip()}\n\n{section(task_type)}", encoding="utf-8", errors="surrogateescape")
    _add_tag(path)  # PEFT keeps the text of a card that is there, and writes its own tags


def _add_tag(path: Path) -> None:
    try:
        metadata = metadata_load(path) or {}
        tags = metadata.get("tags") or []
        if isinstance(tags, list) and TAG not in tags:
            metadata_save(path, metadata | {"tags": [*tags, TAG]})
    except Exception as error:  # users edit cards, and a parser of YAML raises many errors: saving must go on
        warnings.warn(f"The metadata of {str(path)!r} cannot be read, and get no tag {TAG!r}: {error}")


def _is_card(path: Path) -> bool:
    return re.search(r"^library_name: *peft$", _text(path), re.MULTILINE) is not None


def _text(path: Path) -> str:
    """Read a file, and keep bytes that are no UTF-8, so that writing gives them back; "" if there is no file."""
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
