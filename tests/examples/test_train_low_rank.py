"""The comparison of low-rank training: its data, how each method gets to its parameters, and the scripts as run."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.examples.test_examples import EXAMPLES, ROOT, example, run
from wara_peft.compression import LowRankLinear, LowRankPlusSparseLinear, OrderedLowRankLinear

SCRIPT, RESUMING = EXAMPLES / "train_low_rank.py", EXAMPLES / "resume_low_rank.py"
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = 3 * ([(64, 64)] * 4 + [(128, 64), (64, 128)])
"""(m, n) of the ViT's layers."""
SIDES, DENSE, BIASES = (sum(f(m, n) for m, n in SHAPES) for f in (lambda m, n: m + n, lambda m, n: m * n, max))


@pytest.fixture(scope="module")
def methods():
    return example("low_rank_methods")


@pytest.fixture(scope="module")
def task():
    return example("low_rank_tasks").VisionTransformer()


def made(methods, task, name: str, steps: int = 20):
    torch.manual_seed(0)
    return methods.METHODS[name](task, task.new_model(), steps)


class TestTasks:
    def test_splits_share_no_image(self, task) -> None:
        images = [pixels.flatten(1) for pixels, _ in task.splits.values()]
        assert [len(part) for part in images] == [898, 449, 450]
        assert len(torch.cat(images).unique(dim=0)) == 1797

    def test_batches_are_those_of_the_seed(self, task) -> None:
        first, same, other = (next(task.batches(seed))["labels"] for seed in (0, 0, 1))
        assert torch.equal(first, same) and not torch.equal(first, other)

    def test_accuracy(self, task) -> None:
        class Oracle(torch.nn.Module):
            def forward(self, pixel_values):
                # It knows the labels of the first hundred test images, and takes all else for zeros.
                found = torch.zeros(len(pixel_values), 10)
                pixels, labels = task.splits["test"]
                for row, image in enumerate(pixel_values):
                    index = int((pixels == image).flatten(1).all(1).nonzero())
                    found[row, labels[index] if index < 100 else 0] = 1
                return type("Output", (), {"logits": found})

        labels = task.splits["test"][1]
        expected = (100 + int((labels[100:] == 0).sum())) / 450
        assert task.evaluate(Oracle(), "test") == pytest.approx(100 * expected)

    def test_perplexity_is_that_of_the_next_byte(self) -> None:
        task = example("low_rank_tasks").LanguageModel()
        blocks = torch.tensor([[1, 2, 2], [0, 2, 1]])
        task.__dict__["splits"] = {"test": (blocks, blocks)}
        shares = torch.tensor([0.2, 0.3, 0.5])

        class Unigram(torch.nn.Module):
            def forward(self, input_ids):
                return type("Output", (), {"logits": shares.log().expand(*input_ids.shape, 3)})

        expected = math.exp(-(3 * math.log(0.5) + math.log(0.3)) / 4)  # of 2, 2 and 2, 1; not of the first ones
        assert task.evaluate(Unigram(), "test") == pytest.approx(expected)


class TestMethods:
    def test_the_dense_model_is_as_large_as_said(self, methods, task) -> None:
        method = made(methods, task, "dense")
        assert (method.sides, method.dense, method.allowed) == (SIDES, DENSE, 8 * SIDES)

    @pytest.mark.parametrize("name", ["low-rank", "SLTrain", "Maestro", "TRP", "SVD"])
    def test_ends_with_as_many_parameters_as_the_low_rank_model(self, methods, task, name: str) -> None:
        method = made(methods, task, name)
        before = [parameter.clone() for parameter in method.model.parameters()]
        methods.train(method, 1e-3, 0)
        method.finish()
        kind = LowRankPlusSparseLinear if name == "SLTrain" else LowRankLinear
        layers = [layer for _, layer in method.targets()]
        assert len(layers) == 18 and all(type(layer) is kind for layer in layers)
        weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters()) - sum(
            m for m, _ in SHAPES
        )
        assert 0.99 * 8 * SIDES < weights <= 8 * SIDES
        assert method.kept_beside == 0
        assert not any(torch.equal(a, b) for a, b in zip(before, method.model.parameters(), strict=False))

    def test_maestro_is_cut_step_by_step(self, methods, task) -> None:
        method = made(methods, task, "Maestro", 36)
        optimizer = methods.optimizer_for(method.model)
        sizes = [sum(layer.rank * sum(layer.weight.shape) for layer in method.training.layers.values())]
        full = sum(min(m, n) * (m + n) for m, n in SHAPES)
        assert sizes == [full]
        for done in range(1, 37):
            method.after_step(done, optimizer)
            now = sum(layer.rank * sum(layer.weight.shape) for layer in method.training.layers.values())
            sizes += [now] if now != sizes[-1] else []
        assert len(sizes) == 10
        for number, size in enumerate(sizes):
            expected = full * (8 * SIDES / full) ** (number / 9)
            assert expected - 192 < size <= expected + 1e-6

    def test_trp_truncates_in_the_first_half_and_keeps_a_direction(self, methods, task) -> None:
        method = made(methods, task, "TRP")
        assert method.kept_beside == 4 * DENSE
        weight = method.targets()[0][1].weight
        method.before_forward(0)
        assert int(torch.linalg.matrix_rank(weight.detach())) < 64
        method.after_step(10, methods.optimizer_for(method.model))
        assert method.kept_beside == 0 and type(method.targets()[0][1]) is LowRankLinear

    def test_ranks_are_the_greatest_shares_within_the_budget(self, methods) -> None:
        torch.manual_seed(0)
        layers = [OrderedLowRankLinear(12, 8, 8), OrderedLowRankLinear(6, 10, 6), OrderedLowRankLinear(8, 8, 8)]
        with torch.no_grad():
            layers[1].down.weight.mul_(100)  # a layer's scale does not matter
            layers[2].down.weight[3:] *= 1e-3
        for budget in (50.0, 150.0, 300.0, 1000.0):
            ranks = methods.ranks_within(layers, budget)
            sizes = [20, 16, 16]
            spent = sum(rank * size for rank, size in zip(ranks, sizes, strict=True))
            assert spent <= budget
            shares = []
            for layer in layers:
                down, up = layer.down.weight.detach().numpy(), layer.up.weight.detach().numpy()
                worth = [np.linalg.norm(down[b:]) * np.linalg.norm(up[:, b:]) for b in range(layer.rank)]
                shares.append([value / worth[0] for value in worth] + [0.0])
            if budget == 1000:
                assert ranks == [8, 6, 8]
                continue
            # What comes next is worth less than all that is kept, and there is no room for it.
            following = [share[rank] for share, rank in zip(shares, ranks, strict=True)]
            assert max(following) <= min(share[rank - 1] for share, rank in zip(shares, ranks, strict=True) if rank)
            assert spent + sizes[int(np.argmax(following))] > budget

    def test_moments_of_parameters_that_stay_are_kept(self, methods, task) -> None:
        method = made(methods, task, "SVD")
        batch = next(task.batches(0))
        optimizer = methods.optimizer_for(method.model)
        methods.train_step(method, optimizer, batch, 0)
        assert methods.optimizer_for(method.model, optimizer) is optimizer
        head = method.model.classifier.weight
        moment = optimizer.state[head]["exp_avg"]
        method.after_step(10, optimizer)
        new = methods.optimizer_for(method.model, optimizer)
        assert new is not optimizer and new.state[head]["exp_avg"] is moment
        assert method.targets()[0][1].down.weight not in new.state
        assert {id(p) for p in new.param_groups[0]["params"]} == {id(p) for p in method.model.parameters()}


def test_rates_are_those_that_validation_of_other_seeds_chose(methods) -> None:
    study, report = example("low_rank_study"), example("low_rank_report")
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for line in (RESULTS / "low_rank_training.jsonl").read_text().splitlines():
        result = json.loads(line)
        if result["seed"] in report.TUNING_SEEDS:
            name = result["task"].partition("/")[2]
            found.setdefault((name, result["method"]), {}).setdefault(result["rate"], []).append(result["validation"])
    assert found.keys() == {(task.name, name) for task in study.TASKS for name in methods.METHODS}
    for (task, method), rates in found.items():
        assert all(len(values) == len(report.TUNING_SEEDS) for values in rates.values())
        better = max if task == "vision transformer" else min
        best = better(rates, key=lambda rate: sum(rates[rate]))
        assert best == study.CHOSEN[task][method], (task, method)
        assert min(rates) < best < max(rates), (task, method)
    assert not set(report.TUNING_SEEDS) & set(report.SEEDS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("low_rank")
    result = run(SCRIPT, "--quick", directory=folder)
    assert result.returncode == 0, result.stderr
    return result, folder / "train_low_rank_output" / "quick"


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "low_rank_training.jsonl").read_text().splitlines()]


@pytest.mark.slow
class TestQuickRun:
    def test_table_of_all_methods(self, methods, quick) -> None:
        result, folder = quick
        lines = lines_of(folder)
        tables = result.stdout.split("\n\n")
        for task, table in zip(("language model", "vision transformer"), tables, strict=True):
            own = [line for line in lines if line["task"] == f"low_rank_training/{task}"]
            assert {(line["method"], line["seed"]) for line in own} == {
                (name, seed) for name in methods.METHODS for seed in (0, 1)
            }
            assert len(own) == 2 * len(methods.METHODS)
            of = {name: [line["test"] for line in own if line["method"] == name] for name in methods.METHODS}
            for name in methods.METHODS:
                runs = [line for line in own if line["method"] == name]
                first, second = (line["test"] for line in runs)
                (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
                cells = [cell.strip() for cell in row.split("|")[1:-1]]
                # Student's t at 97.5 % with one degree of freedom is 12.706.
                assert cells[3] == f"{(first + second) / 2:.2f} ± {12.7062 * abs(first - second) / 2:.2f}"
                for cell, base in zip(cells[4:6], ("low-rank", "dense"), strict=True):
                    one, two = first - of[base][0], second - of[base][1]
                    expected = f"{(one + two) / 2:+.2f} ± {12.7062 * abs(one - two) / 2:.2f}"
                    assert cell == (expected if name != base else "")
                memory = runs[0]["memory"]
                assert cells[6].startswith(f"{memory['first'] / 1e6:.2f}")
                for cell in cells[6:8]:
                    assert ("at last" in cell) == (name in ("Maestro", "TRP", "SVD"))
                assert cells[8] == f"{(runs[0]['time']['inference'] + runs[1]['time']['inference']) / 2:.2f}"

    def test_finished_runs_are_not_run_again(self, quick, tmp_path: Path) -> None:
        folder = tmp_path / "train_low_rank_output" / "quick"
        shutil.copytree(quick[1], folder)
        kept = (folder / "low_rank_training.jsonl").read_text().splitlines(keepends=True)
        # The last run was killed while it wrote its line.
        (folder / "low_rank_training.jsonl").write_text("".join(kept[:-1]) + kept[-1][:40])
        again = run(SCRIPT, "--quick", directory=tmp_path)
        assert again.returncode == 0, again.stderr
        lines, before = (folder / "low_rank_training.jsonl").read_text().splitlines(), [json.loads(k) for k in kept]
        assert [json.loads(line) for line in lines[:-2]] == before[:-1] and lines[-2] == kept[-1][:40]
        # The seed decides all but times.
        ignored = {"seconds": 0, "time": 0}
        assert {**json.loads(lines[-1]), **ignored} == {**before[-1], **ignored}

    def test_picture(self, quick) -> None:
        assert (quick[1] / "low_rank_training.png").read_bytes().startswith(b"\x89PNG")


# The script with processes that begin where the imports are done, in place of fresh interpreters.
RESUMING_BY_FORKS = f"""
import os, runpy, subprocess, sys

class Fork:
    def __init__(self, command, stdout, text):
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.dup2(write, 1)
            sys.argv = command[1:]
            runpy.run_path(command[1], run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
        os.close(write)
        self.stdout = os.fdopen(read)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send_signal(self, number):
        os.kill(self.pid, number)

subprocess.Popen = Fork
sys.argv = [{str(RESUMING)!r}]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_training_that_is_killed_resumes_to_the_bit(tmp_path: Path) -> None:
    result = run("-c", RESUMING_BY_FORKS, directory=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "killed after step 10" in result.stdout and "A fresh process resumes checkpoint-6" in result.stdout
    assert re.search(r"all [\d,]+ numbers of \d+ tensors are equal to the bit", result.stdout)
    # The killed one wrote no checkpoint after the sixth step, and its successor did.
    output = tmp_path / "resume_low_rank_output"
    assert {path.name for path in (output / "killed").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (6, 12, 18, 24)
    }
    state = (output / "killed" / "checkpoint-24" / "trainer_state.json").read_text()
    assert json.loads(state)["global_step"] == 24


@pytest.mark.slow
def test_a_difference_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: here the resumed training has another seed."""
    script = example("resume_low_rank")

    def altered(args, name, kill=False):
        if name == "killed":
            shutil.copytree(args.output_dir / "whole-saved", args.output_dir / "killed-saved", dirs_exist_ok=True)
            path = args.output_dir / "killed-saved" / "model.safetensors"
            tensors = script.load_file(path)
            tensors["lm_head.weight"][0, 0] += 1e-3
            script.save_file(tensors, path, metadata={"format": "pt"})
        else:
            run(RESUMING, "--output-dir", args.output_dir, "--run", name, directory=tmp_path)

    monkeypatch.setattr(script, "start", altered)
    monkeypatch.setattr("sys.argv", ["resume_low_rank.py", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert "1 tensors are not what they are without an interruption, lm_head.weight among them" in stopped.value.code


@pytest.mark.parametrize(
    ("script", "option"),
    [("train_low_rank", "--output-dir"), ("train_low_rank", "--results"), ("resume_low_rank", "--output-dir")],
)
def test_bad_input_is_told_before_training(tmp_path: Path, monkeypatch, script: str, option: str) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{script}.py", option, str(file)])
    with pytest.raises(SystemExit) as stopped:
        example(script).main()
    assert stopped.value.code.startswith(f"{script}.py: error: {option} {file} cannot be used as a folder")
