"""Low-rank training on two processes makes the weights of one process on the same data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.low_rank_run import METHODS, train

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("several")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["tests.distributed.low_rank_run", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
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
