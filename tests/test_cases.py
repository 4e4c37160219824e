"""The table of adapters: it has every form and every kind of layer, and what a row cannot do is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.cases import CASES, Case
from wara_peft import to_lora
from wara_peft.base_layers.kinds import KINDS
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.forms import FORMS


def merge(case: Case, path: Path) -> Iterator[Callable[[], object]]:
    model = case.adapted()
    yield model.merge_adapter
    yield model.merge_and_unload


def export(case: Case, path: Path) -> Iterator[Callable[[], object]]:
    model = case.adapted()
    model.save_pretrained(path)
    yield lambda: to_lora(model)
    yield lambda: to_lora(path)


def read(case: Case, path: Path) -> Iterator[Callable[[], object]]:
    case.adapted().save_pretrained(path)
    yield lambda: to_lora(path)
    yield lambda: SavedAdapter(path)


def merge_on_disk(case: Case, path: Path) -> Iterator[Callable[[], object]]:
    case.base().save_pretrained(path / "base")
    case.adapted().save_pretrained(path / "adapter")
    yield lambda: merge_checkpoint(path / "base", path / "adapter", path / "out")


ABILITIES: dict[str, Callable[[Case, Path], Iterator[Callable[[], object]]]] = {
    "add": lambda case, path: iter([case.adapted]),
    "merge": merge,
    "export": export,
    "read": read,
    "merge on disk": merge_on_disk,
    "mixed batch": lambda case, path: iter(
        [lambda: case.output(case.adapted(), adapter_names=["default", "__base__"])]
    ),
    "combine": lambda case, path: iter(
        [lambda: case.with_twin().add_weighted_adapter(["default", "twin"], [0.7, -1.5], "both", "cat")]
    ),
}
REFUSED = [
    pytest.param(case, ability, id=f"{ability}: {case.name}")
    for case in CASES.values()
    for ability in (["add"] if "add" in case.refused else case.refused)
    if ability != "merge on disk" or case.is_of_transformers
]


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings|levels=")
@pytest.mark.parametrize(("case", "ability"), REFUSED)
def test_what_a_row_cannot_do_is_refused(case: Case, ability: str, tmp_path: Path) -> None:
    for attempt in ABILITIES[ability](case, tmp_path):
        with pytest.raises((ValueError, TypeError), match=case.refused[ability]):
            attempt()
    assert not (tmp_path / "out").exists()


def test_every_form_is_tried_beside_every_kind_of_layer() -> None:
    assert {(case.form, kind) for case in CASES.values() for kind in case.kinds} == set(product(FORMS, KINDS))
