"""Training on two processes has the losses, and makes the adapter, of one process on the same data; beside LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from peft import PeftModel
from safetensors.torch import load_file

from tests.distributed.adapter_run import CONFIGS, base_model, batches, inputs_of
from tests.forked_python import run_python

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(kind: str, directory: Path) -> Path:
    processes = 1 if kind == "single" else 2
    result = run_python("-m", "tests.distributed.adapter_run", kind, directory, processes=processes)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return run("single", tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module", params=["ddp", "fsdp1", "fsdp2"])
def several(request, tmp_path_factory) -> Path:
    return run(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("method", CONFIGS)
def test_two_processes_train_as_one(method, several, single):
    if method == "schedule" and "fsdp" in several.name:
        assert "is sharded, as by FSDP" in (several / method / "refused.txt").read_text()
        return
    several, single = several / method, single / method
    losses, expected = (json.loads((path / "losses.json").read_text()) for path in (several, single))
    assert losses == pytest.approx(expected, abs=2e-5)
    assert len(set(expected)) > 3
    found, reference = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (several, single))
    assert found.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)

    loaded = PeftModel.from_pretrained(base_model(method), several / "adapter").eval()
    expected_model = PeftModel.from_pretrained(base_model(method), single / "adapter").eval()
    inputs = inputs_of(method, batches()[0])
    torch.testing.assert_close(loaded(**inputs).logits, expected_model(**inputs).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2", "zero3"])
def test_accelerate_knows_every_field_of_the_launch_configs(name):
    config = load_config_from_file(str(ROOT / "examples" / "distributed" / f"{name}.yaml"))
    assert config.num_processes == 2
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    prefix = "fsdp_" if name.startswith("fsdp") else "zero"
    known = {action.dest for action in launch_command_parser()._actions}
    fields = {**config.fsdp_config, **config.deepspeed_config}
    assert fields.keys() <= known, fields.keys() - known
    assert name == "ddp" or any(field.startswith(prefix) for field in fields)


def test_the_example_runs_on_two_processes(tmp_path):
    script = [ROOT / "examples" / "finetune.py", "--use-cpu", "--max-per-class", "15", "--epochs", "1"]
    result = run_python(*script, processes=2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "trained by 2 processes" in result.stdout
    assert (tmp_path / "finetune_output" / "adapter" / "adapter_model.safetensors").exists()
