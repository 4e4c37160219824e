"""Reparametrised LoRA that two processes shard has the values, states and files of one process, and of plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.reparametrized_run import CASES
from tests.forked_python import run_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """Run the cases of a module in two processes, and give what failed in each."""
    directory: Path = tmp_path_factory.mktemp("reparametrized")
    result = run_python("-m", "tests.distributed.reparametrized_run", directory, processes=2)
    assert result.returncode == 0, result.stderr
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_two_processes_are_as_one(case, reports):
    for report in reports:
        assert report["last"] == CASES[-1].__name__  # all cases were run
        assert case.__name__ not in report["failed"], report["failed"][case.__name__]
