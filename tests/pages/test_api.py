"""The import paths that CONTRIBUTING promises are there, and docs/api lists what they export."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import wara_peft

ROOT = Path(__file__).parents[2]
PROMISED = re.findall(
    r"`([\w.]+)`",
    re.search(r"^Promised import paths are (.*?)\. ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)[1],
)
LISTED = [
    found
    for page in sorted((ROOT / "docs/api").glob("*.md"))
    for found in re.findall(r"auto(module|class):: ([\w.]+)", page.read_text(encoding="utf-8"))
]


def test_promised_paths():
    assert {"wara_peft", "wara_peft.config", "wara_peft.model"} <= set(PROMISED)
    assert importlib.import_module("wara_peft.config").WaRAConfig is wara_peft.WaRAConfig
    assert importlib.import_module("wara_peft.model").WaRAModel is wara_peft.WaRAModel


@pytest.mark.parametrize("path", [path for kind, path in LISTED if kind == "module"])
def test_the_reference_has_promised_paths_that_export_documented_names(path):
    assert path in PROMISED
    module = importlib.import_module(path)
    assert module.__all__
    assert [name for name in module.__all__ if not getattr(module, name).__doc__] == []


@pytest.mark.parametrize("path", [path for kind, path in LISTED if kind == "class"])
def test_the_reference_has_classes_that_are_there(path):
    module, _, name = path.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)
