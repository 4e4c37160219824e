"""Low-rank training on two processes makes the weights of one process on the same data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.low_rank_run import METHODS, train
from tests.forked_python import run_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("several")
    result = run_python("-m", "tests.distributed.low_rank_run", directory, processes=2)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(several: Path, method: str) -> None:
    found, expected = torch.load(several / f"{method}.pt"), train(method)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9, msg=name)
    if method == "ordered":
        assert any(key.endswith("down.weight") for key in found)  # it has been cut below the break-even
