"""Training on two processes has the losses, and makes the adapter, of one process on the same data; beside LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.distributed_run import base_model, batches

ROOT = Path(__file__).parents[1]
METHODS = ("wara", "lora")

pytestmark = pytest.mark.slow


def run(kind: str, method: str, directory: Path) -> None:
    command = [sys.executable, "-m"]
    if kind != "single":
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["tests.distributed_run", kind, str(directory), "--method", method]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, Path]:
    directories = {method: tmp_path_factory.mktemp(method) for method in METHODS}
    for method, directory in directories.items():
        run("single", method, directory)
    return directories


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_two_processes_train_as_one(kind, method, single, tmp_path):
    run(kind, method, tmp_path)

    losses, expected = (json.loads((path / "losses.json").read_text()) for path in (tmp_path, single[method]))
    assert losses == pytest.approx(expected, abs=2e-5)
    assert len(set(expected)) > 3
    found, reference = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path, single[method])
    )
    assert found.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)

    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval()
    expected_model = PeftModel.from_pretrained(base_model(), single[method] / "adapter").eval()
    torch.testing.assert_close(loaded(batches()[0]).logits, expected_model(batches()[0]).logits, atol=1e-4, rtol=1e-3)
