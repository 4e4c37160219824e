"""The example of compressing and healing runs end to end at a tiny size; nothing here looks at how well."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.examples.test_examples import EXAMPLES, ROOT, example, run
from wara_peft.compression import SVD, calibrate, compress

SCRIPT = EXAMPLES / "compress_and_heal.py"
RESULTS = ROOT / "benchmarks" / "results"
OUTPUT = "new/folder/quick"
QUICK = ("--quick", "--models", "minilm", "bytes", "smollm2", "--output-dir", "new/folder")


def task_of(line: dict) -> str:
    return line["task"].partition("/")[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("quick")
    return run(SCRIPT, *QUICK, directory=folder), folder


@pytest.fixture(scope="module")
def lines(quick: tuple[subprocess.CompletedProcess[str], Path]) -> list[dict]:
    assert quick[0].returncode == 0, quick[0].stderr
    return [json.loads(line) for line in (quick[1] / OUTPUT / "compress_and_heal.jsonl").read_text().splitlines()]


@pytest.mark.slow
class TestQuickRun:
    def test_each_way_is_measured_within_its_budget(self, lines: list[dict]) -> None:
        for task in ("MiniLM", "byte-level Llama"):
            own = [line for line in lines if task_of(line) == task]
            assert len(own) == 1 + 2 * 4 + 1 + 2 * 6
            (dense,) = (line for line in own if line["solver"] == "dense")
            for line in own:
                if line is not dense:
                    most = 0.55 if line["allocation"] == "cost" else line["budget"]  # by cost the budget is of that
                    assert 0.3 < line["share_of_targets"] <= most
                    assert line["parameters"] < dense["parameters"]

    def test_adapters_have_as_many_parameters(self, lines: list[dict]) -> None:
        by = {(task_of(line), line["solver"], line["healed_with"]): line["adapter_parameters"] for line in lines}
        for task in ("MiniLM", "byte-level Llama"):
            for solver in ("svd", "activation"):
                lora, factors, layers = (
                    by[task, solver, f"{name} on {where}"]
                    for name, where in (("LoRA", "factors"), ("WaRA", "factors"), ("WaRA", "layers"))
                )
                assert lora <= factors < 1.01 * lora  # odd ranks round up
                assert 0.9 * lora < layers <= lora

    def test_tables_picture_and_resuming(
        self, quick: tuple[subprocess.CompletedProcess[str], Path], lines: list[dict]
    ) -> None:
        done, folder = quick
        svd = [line for line in lines if task_of(line) == "MiniLM" and line["solver"] == "svd"]
        scores = {(line["healed_with"], line["seed"]): line["test"] for line in svd if line["healed_with"]}
        differences = [scores["WaRA on layers", seed] - scores["LoRA on factors", seed] for seed in (0, 1)]
        of_minilm = done.stdout.split("byte-level Llama**")[0].splitlines()
        assert "**SmolLM2-135M**, perplexity of a token" in done.stdout
        assert (folder / OUTPUT / "compress_smollm2.png").read_bytes().startswith(b"\x89PNG")
        (row,) = (row for row in of_minilm if row.startswith("| svd | uniform | WaRA on layers |"))
        assert f"| {statistics.mean(differences):+.2f} ± " in row
        assert (folder / OUTPUT / "compress_and_heal.png").read_bytes().startswith(b"\x89PNG")
        results = folder / OUTPUT / "compress_and_heal.jsonl"
        kept = results.read_text().splitlines()
        results.write_text("\n".join(kept[:-1]) + "\n")
        again = run(SCRIPT, *QUICK, directory=folder)
        assert again.returncode == 0, again.stderr
        resumed = results.read_text().splitlines()
        last, before = json.loads(resumed[-1]), json.loads(kept[-1])
        assert resumed[:-1] == kept[:-1]
        assert {**last, "seconds": 0} == {**before, "seconds": 0, "test": pytest.approx(before["test"], rel=1e-3)}


def test_rates_are_those_that_other_seeds_chose() -> None:
    script, report = example("compress_and_heal"), example("compress_report")
    lines = [json.loads(line) for line in (RESULTS / "compress_and_heal.jsonl").read_text().splitlines()]
    language_model = "SmolLM2-135M"  # which takes too long to choose
    tuning = [line for line in lines if line["seed"] in report.TUNING_SEEDS and task_of(line) != language_model]
    assert len(tuning) == 2 * 2 * 3 * len(script.RATES) * len(report.TUNING_SEEDS)
    means = report.tuned(tuning)
    for (task, method), chosen in script.CHOSEN.items():
        if task == language_model:
            assert {chosen} == {script.CHOSEN[other, method] for other in ("MiniLM", "byte-level Llama")}
            continue
        best = min if task == "byte-level Llama" else max
        assert chosen == best(script.RATES, key=lambda rate: means[task, method, rate])
    assert not set(report.TUNING_SEEDS) & set(report.SEEDS)
    for line in lines:
        if line["seed"] in report.SEEDS:
            assert line["rate"] == script.CHOSEN.get((task_of(line), line["healed_with"]), 0)


@pytest.fixture(scope="module")
def language_model() -> tuple[object, nn.Module]:
    """The task of a language model at a tiny size, on texts that cost nothing to find, and its dense model."""
    data = example("docstring_data")
    texts = tuple(data.LabelledText(f"Return the number {i} of the rows that are shown first.", 0) for i in range(20))
    task = example("compress_tasks").SmolLM2(data.DocstringData(("one",), texts, texts, texts), quick=True)
    return task, task.dense(seed=0)


def test_a_language_model_is_compressed_healed_and_stored(language_model: tuple[object, nn.Module]) -> None:
    task, dense = language_model
    script = example("compress_and_heal")
    batches = list(task.batches("train"))
    found = calibrate(dense, batches, ("inputs", "gradients", "fisher"), show_progress_bar=False)
    targets = sum(dense.get_submodule(name).weight.numel() for name in found)
    run = script.Run(task.name, "activation-fisher", "greedy", 0.6)
    measured = script.measured(dense, task, found, run)
    kept = measured["parameters"] - (sum(parameter.numel() for parameter in dense.parameters()) - targets)
    assert 0.59 * targets < kept <= 0.6 * targets
    assert measured["stored"]["16 bits"]["bytes"] == 2 * kept
    assert kept / 2 < measured["stored"]["nf4, double"]["bytes"] < 0.8 * kept  # tables of each layer weigh here
    losses = [dense(**batch).loss.item() for batch in task.batches("test")]
    assert measured["test"] == measured["stored"]["16 bits"]["perplexity"]
    assert measured["test"] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=0.2)  # of random weights
    healed = script.measured(dense, task, found, replace(run, method="WaRA on factors", rate=1e-2))
    assert healed["parameters"] == measured["parameters"]
    same = pytest.approx(measured["stored"]["nf4, double"]["bytes"], abs=100)  # settings of each layer are text
    assert healed["stored"]["nf4, double"]["bytes"] == same
    assert healed["test"] != measured["test"]
    dense_way = script.measured(dense, task, found, script.Run(task.name))
    assert list(dense_way["stored"]) == ["16 bits", "int8", "nf4", "nf4, double"]


@pytest.mark.parametrize(
    "storage, of_weights",
    [
        ("16 bits", lambda m, n: 2 * m * n),
        ("int8", lambda m, n: m * n + 4 * m + 1),  # a float32 for each output, and how the bytes are laid out
        ("nf4", lambda m, n: m * n // 2 + 4 * (m * n // 64) + 4 * 16),  # for each 64 values a float32; a table
        ("nf4, double", lambda m, n: m * n // 2 + m * n // 64 + 4 * (m * n // 64**2 // 4) + 4 * 16 + 4 * 256),
    ],
)
def test_bytes_are_those_of_a_saved_state_dict(storage: str, of_weights: Callable, tmp_path: Path) -> None:
    """A dense layer of 256 × 128 with a bias, and one of rank 64, beside a layer that is not counted."""
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 256, bias=False), nn.Linear(256, 8))
    compress(model, SVD({"1": 64}), show_progress_bar=False)
    made, size = example("compress_storage").stored(model, ["0", "1"], storage)
    if storage == "16 bits":
        made.half()
    save_file(made.state_dict(), tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    of_layers = {key: tensor.nbytes for key, tensor in saved.items() if not key.startswith("2.")}
    assert size == sum(of_layers.values())
    settings = sum(count for key, count in of_layers.items() if "quant_state" in key)  # as text
    assert size == sum(of_weights(m, n) for m, n in ((256, 128), (64, 256), (256, 64))) + 2 * 256 + settings
    x = torch.randn(4, 128)
    tolerance = {"16 bits": 1e-3, "int8": 0.05}.get(storage, 0.3)
    made, _ = example("compress_storage").stored(model, ["0", "1"], storage)
    with torch.no_grad():
        assert (made(x) - model(x)).norm() < tolerance * model(x).norm()


@pytest.mark.slow
def test_a_file_for_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(SCRIPT, "--output-dir", "file", directory=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert "compress_and_heal.py: error: --output-dir file cannot be used as a folder" in result.stderr
