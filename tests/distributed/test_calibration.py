"""`calibrate` on two processes, whose numbers of batches differ, gives all of them the statistics of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.forked_python import run_python
from wara_peft.compression import load_statistics

pytestmark = pytest.mark.slow


def test_two_processes_calibrate_as_one(tmp_path: Path) -> None:
    for processes in (1, 2):
        result = run_python("-m", "tests.distributed.calibration_run", tmp_path / str(processes), processes=processes)
        assert result.returncode == 0, result.stderr
    for name in ("uneven", "few"):
        expected = load_statistics(tmp_path / "1" / f"{name}-0")
        for place in (f"{name}-0", f"{name}-1", f"{name}-shared"):
            found = load_statistics(tmp_path / "2" / place)
            assert found.keys() == expected.keys()
            for layer, entry in expected.items():
                assert found[layer].count == entry.count > 0
                for what, tensor in entry.tensors().items():
                    scale = float(tensor.abs().max())
                    torch.testing.assert_close(
                        found[layer].tensors()[what], tensor, rtol=0, atol=1e-12 * scale, msg=f"{place} {layer} {what}"
                    )
