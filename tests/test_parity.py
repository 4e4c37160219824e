"""The table of features, run with LoRA and with WaRA, and the page of the docs that shows it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from docs.compatibility import PAGE, page
from tests.parity import AREAS
from tests.parity.table import DIFFERS, LORA, METHODS, REFUSED, WORKS, Method, Row, is_as_expected, outcome

CHECKED = [row for area in AREAS for row in area.rows if row.check is not None]
ELSEWHERE = [row for area in AREAS for row in area.rows if row.test is not None]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row.feature)
@pytest.mark.filterwarnings("ignore")
def test_row(row: Row, method: Method, tmp_path: Path):
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        pytest.skip(f"{row.needs} is not installed")
    found = outcome(row, method, tmp_path)
    assert is_as_expected(found, row.lora if method is LORA else row.wara), found


def test_the_table():
    features = [row.feature for area in AREAS for row in area.rows]
    assert len(features) == len(set(features)) >= 60
    for row in CHECKED:
        for expected in (row.lora, row.wara):
            assert expected == WORKS or expected.startswith((REFUSED, DIFFERS))
        assert bool(row.instead) >= (row.lora == WORKS != row.wara), f"{row.feature} does not say what to do"
    for row in ELSEWHERE:
        assert (Path(__file__).parents[1] / row.test).is_file()


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.compatibility"
