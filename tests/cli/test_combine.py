"""`wara-peft combine`: what it writes and says, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tests.cli.test_cli import complaints, llama, run_fork, say
from wara_peft import WaRAConfig
from wara_peft.disk.checkpoints.tensors import TensorFile
from wara_peft.lora.combine_saved import combine_adapters


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A WaRA adapter and a LoRA of one base."""
    path = tmp_path_factory.mktemp("made")
    for name, config in {
        "wara": WaRAConfig(target_modules=["q_proj", "down_proj"], wavelet="db2", r=3, init_weights=False),
        "lora": LoraConfig(target_modules=["q_proj", "v_proj"], r=12, init_lora_weights=False),
        "small": LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False),
        "head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }.items():
        get_peft_model(llama(), config).save_pretrained(path / name)
    return path


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A folder with the adapters, which commands are run in."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "here"))
    return Path.cwd()


@pytest.mark.parametrize(
    ("options", "rank", "said"),
    [
        (["--type", "cat"], 24, r"It is the exact weighted sum of the weight updates\."),
        (["--type", "cat", "--dtype", "bf16"], 24, r"It is the exact .*, but for the rounding to bfloat16\."),
        ([], 12, r"Relative error of the weighted sum, in Frobenius norm: 0\.\d+\."),
        (["--svd-rank", 4], 4, r"Relative error of the weighted sum, in Frobenius norm: 0\.\d+\."),
        (["--type", "ties", "--density", 0.5], 12, r"Load it by .*"),
        (["--type", "dare_ties_svd", "--density", 0.5, "--seed", 3], 12, r"Load it by .*"),
    ],
)
def test_what_it_writes_and_says(here, options, rank, said):
    before = os.listdir()
    result = say("combine", "wara", "lora", "-w", "0.7,-0.3", *options, "out")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"Wrote out: LoRA of rank {rank}, 6 modules."
    assert re.fullmatch(said, lines[1])
    assert lines[-1] == "Load it by PeftModel.from_pretrained(model, 'out')."
    assert sorted(os.listdir()) == sorted([*before, "out"])
    assert sorted(os.listdir("out")) == ["adapter_config.json", "adapter_model.safetensors"]
    names = dict(zip(map(str, options[::2]), options[1::2], strict=True))
    combine_adapters(
        ["wara", "lora"],
        [0.7, -0.3],
        "same",
        names.get("--type", "svd"),
        svd_rank=names.get("--svd-rank"),
        density=names.get("--density"),
        seed=names.get("--seed", 0),
        dtype=torch.bfloat16 if "--dtype" in names else None,
    )
    found, expected = (load_file(f"{name}/adapter_model.safetensors") for name in ("out", "same"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_sum_in_a_model(here):
    assert say("combine", "wara", "lora", "out", "--weights", "1,-0.5", "--type", "cat").exit_code == 0
    model = PeftModel.from_pretrained(llama(), "out")
    first, second = (PeftModel.from_pretrained(llama(), name) for name in ("wara", "lora"))

    def delta(of: nn.Module, name: str) -> torch.Tensor:
        return of.get_submodule(f"base_model.model.model.layers.1.{name}").get_delta_weight("default")

    expected = delta(first, "self_attn.q_proj") - 0.5 * delta(second, "self_attn.q_proj")
    torch.testing.assert_close(delta(model, "self_attn.q_proj"), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(delta(model, "mlp.down_proj"), delta(first, "mlp.down_proj"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["wara", "-w", "1"], 2, "Missing argument 'OUT'"),
        (["wara", "lora", "out"], 2, "Missing option '--weights' / '-w'"),
        (["wara", "lora", "out", "-w", "0.7"], 2, "give one weight for each ADAPTER before OUT: there are 1, and 2"),
        (["wara", "lora", "-w", "0.7,0.3"], 2, "give one weight for each ADAPTER before OUT: there are 2, and 1"),
        (["wara", "lora", "out", "-w", "0.7 0.3"], 2, "'0.7 0.3' is not a list of numbers such as 0.7,0.3"),
        (["wara", "lora", "out", "-w", "1,1", "--type", "mean"], 2, "'mean' is not one of 'cat', 'linear', 'svd'"),
        (["wara", "lora", "out", "-w", "1,1", "--svd-rank", "0"], 2, "Invalid value for '--svd-rank'"),
        (["wara", "lora", "out", "-w", "1,1", "--device", "abacus"], 2, "Invalid value for '--device': 'abacus'"),
        (["wara", "lora", "out", "-w", "1,nan"], 1, "The weight nan is not finite"),
        (["wara", "nowhere", "out", "-w", "1,1"], 1, "There is no adapter directory 'nowhere'"),
        (["wara", "lora", "out", "-w", "1,1", "--type", "ties"], 1, "'ties' needs `density`"),
        (["wara", "lora", "out", "-w", "1,1", "--type", "ties_svd", "--density", "0"], 1, "density=0.0 is the share"),
        (["wara", "lora", "out", "-w", "1,1", "--density", "0.5"], 1, "density=0.5 has no meaning"),
        (["wara", "small", "out", "-w", "1,1", "--type", "linear"], 1, "'wara' has 12, 'small' has 2. Use 'svd'"),
        (["wara", "head", "out", "-w", "1,1"], 1, "has modules_to_save=['lm_head']: what was trained in full"),
        (["wara", "lora", "small", "-w", "1,1"], 1, "'small' exists already"),
        (["wara", "lora", "lora", "-w", "1,1", "--overwrite"], 1, "'lora' holds 'lora', which must not be replaced"),
        (["wara", "lora", "lora/adapter_config.json", "-w", "1,1"], 1, "is a file; name a directory"),
    ],
)
def test_what_it_refuses_before_it_reads_tensors(here, monkeypatch, arguments, status, said):
    def no_reading(*_: object) -> None:
        raise AssertionError("tensors are read before the refusal")

    monkeypatch.setattr(TensorFile, "read", no_reading)
    before = sorted(here.rglob("*"))
    result = say("combine", *arguments)
    assert result.exit_code == status, result.stderr
    assert said in " ".join(re.sub("[│╭╮╰╯─]", "", result.stderr).split())
    assert not result.stdout
    assert status == 2 or len(complaints(result)) == 1
    assert sorted(here.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted(here, number):
    """The signal comes when all is written, and nothing has its name yet."""
    before = sorted(os.listdir())
    signals = f"""
        import os
        import wara_peft.lora.combine_saved as combine_saved
        combine_saved.write_lora = lambda folder, *_: (
            (folder / "adapter_model.safetensors").write_text("half"), os.kill(os.getpid(), {int(number)})
        )
    """
    arguments = ["combine", "wara", "lora", "out", "-w", "1,1", "--type", "cat"]
    process = run_fork(*arguments, cwd=here, before=signals)
    if number == signal.SIGTERM:
        assert process.returncode == 1 and "interrupted; nothing was written." in process.stderr
        assert sorted(os.listdir()) == before
        return
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir()) == len(before) + 2 and not os.listdir("out")
    result = say(*arguments)
    assert result.exit_code == 0, result.stderr
    assert sorted(os.listdir()) == sorted([*before, "out"])


@pytest.mark.slow
def test_a_disk_that_is_full(here):
    before = sorted(os.listdir())
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    result = run_fork("combine", "wara", "lora", "new/out", "-w", "1,1", cwd=here, before=limit)
    assert result.returncode == 1, result.stderr
    (line,) = complaints(result)
    assert "File too large" in line
    assert sorted(os.listdir()) == before
