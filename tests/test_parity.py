"""The table of features, run with LoRA, WaRA and WaRA inside LoRA, and the page of the docs that shows it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from docs.compatibility import PAGE, page
from tests.parity import AREAS
from tests.parity.same_factors import Comparison, comparing
from tests.parity.table import (
    DIFFERS,
    INSIDE,
    METHODS,
    REFUSED,
    SAME_FACTORS,
    WORKS,
    Method,
    Row,
    is_as_expected,
    outcome,
)

CHECKED = [row for area in AREAS for row in area.rows if row.check is not None]
ELSEWHERE = [row for area in AREAS for row in area.rows if row.test is not None]


@pytest.fixture
def of_dtype(row: Row) -> Iterator[None]:
    torch.set_default_dtype(row.dtype)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row.feature)
@pytest.mark.filterwarnings("ignore")
def test_row(row: Row, method: Method, tmp_path: Path, of_dtype: None):
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        pytest.skip(f"{row.needs} is not installed")
    comparison = Comparison()
    with comparing(comparison) if method is INSIDE else contextlib.nullcontext():
        found = outcome(row, method, tmp_path)
    assert is_as_expected(found, row.expected(method)), found
    if method is INSIDE and not found.startswith(REFUSED):
        comparison.met = 0
        (tmp_path / "same").mkdir()
        with comparing(comparison):
            torch.manual_seed(0)
            assert outcome(row, SAME_FACTORS, tmp_path / "same") in (found, row.lora)
        assert comparison.met == len(comparison.values)
        assert comparison.adapters or not comparison.values


def test_the_table():
    features = [row.feature for area in AREAS for row in area.rows]
    assert len(features) == len(set(features)) >= 60
    for row in CHECKED:
        for expected in (row.lora, row.wara, row.inside):
            assert expected == WORKS or expected.startswith((REFUSED, DIFFERS))
        assert bool(row.instead) >= (row.lora == WORKS != row.wara), f"{row.feature} does not say what to do"
    for row in ELSEWHERE:
        for test in filter(None, (row.test, row.inside_test)):
            assert (Path(__file__).parents[1] / test).is_file()


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.compatibility"
