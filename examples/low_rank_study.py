"""The comparison of train_low_rank.py: its runs, kept as lines of JSON, and what each of them measures."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from low_rank_methods import METHODS, PERIOD, Dense, optimizer_for, train, train_step
from low_rank_report import SEEDS, Results
from low_rank_tasks import TASKS, Task
from tqdm.auto import tqdm

# The measurements and the store of finished runs are those of the benchmarks.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from harness import environment, interleaved, ratio
from low_rank_memory import bytes_of
from quality.cells import Cell, Store

FAMILY = "low_rank_training"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CHOSEN = {
    "language model": {
        "dense": 3e-3,
        "low-rank": 3e-3,
        "SLTrain": 1e-2,
        "Maestro": 1e-2,
        "TRP": 1e-2,
        "SVD": 1e-2,
    },
    "vision transformer": {
        "dense": 1e-2,
        "low-rank": 3e-3,
        "SLTrain": 1e-2,
        "Maestro": 1e-2,
        "TRP": 1e-2,
        "SVD": 1e-2,
    },
}
"""Learning rates, by what `--tune` found on other seeds."""


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        seeds: first values and order of batches.
        rates: learning rates; None takes those that were chosen.
        folder: of the locks.
        results: folder of the JSON lines.
        steps: of each training; None takes those of the task.
        rounds: in which times are measured.
        judged: rows of each split on which a model is judged; None takes all.
    """

    seeds: range
    rates: tuple[float, ...] | None
    folder: Path
    results: Path
    steps: int | None = None
    rounds: int = 5
    judged: int | None = None

    def cells(self) -> list[tuple[type[Task], Cell]]:
        """Seeds outside, so that no method has the machine's quiet hour to itself."""
        return [
            (task, Cell(f"{FAMILY}/{task.name}", name, float(task.rank), rate, seed))
            for seed in self.seeds
            for task in TASKS
            for name in METHODS
            for rate in self.rates or (CHOSEN[task.name][name],)
        ]

    def run(self) -> Results:
        """Run the cells that are not in the results yet, and return the results of all."""
        store = Store(self.results, self.folder / "locks")
        cells = self.cells()
        left = [(task, cell) for task, cell in cells if cell not in store.results()]
        tasks: dict[type[Task], Task] = {}  # which keep their data
        for kind, cell in tqdm(left, unit="run"):
            with store.claim(cell) as mine:
                if mine:
                    store.append(cell, self.run_cell(tasks.setdefault(kind, kind()), cell))
        found = store.results()
        return {cell: found[cell] for _, cell in cells if cell in found}

    def run_cell(self, task: Task, cell: Cell) -> dict[str, Any]:
        """Train and judge; what it costs is measured for the seeds that are reported."""

        def new() -> Dense:
            torch.manual_seed(cell.seed)
            return METHODS[cell.method](task, task.new_model(), self.steps or task.steps)

        start = time.perf_counter()
        method = new()
        train(method, cell.rate, cell.seed)
        seconds = time.perf_counter() - start
        ended = copy.deepcopy(method)
        method.finish()
        model = method.model.eval()
        result: dict[str, Any] = {split: task.evaluate(model, split, self.judged) for split in ("validation", "test")}
        result["metric"] = task.metric
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        result["seconds"] = round(seconds, 3)
        if cell.seed in SEEDS:
            result["memory"] = memory(new(), method)
            torch.manual_seed(cell.seed)
            result["time"] = times(Dense(task, task.new_model(), 1), new(), ended, method, self.rounds)
        return {**result, **environment()}


def memory(first: Dense, last: Dense) -> dict[str, int]:
    """Bytes of a training step, as it is at first and as it is at last."""
    batch = next(first.task.batches(0))
    return {
        when: bytes_of(copy.deepcopy(method.model).train(), batch)["all"] + method.kept_beside
        for when, method in (("first", first), ("last", last))
    }


def times(dense: Dense, first: Dense, last: Dense, final: Dense, rounds: int) -> dict[str, float]:
    """Time of training steps, as they are at first and at last, and of inference: ratios to the dense model's."""
    batch = next(dense.task.batches(0))

    def steps(method: Dense) -> Callable[[], None]:
        optimizer = optimizer_for(method.model.train())

        def some() -> None:
            for step in range(PERIOD):  # all that a method does now and then is among them
                train_step(method, optimizer, batch, step)

        return some

    def inference(method: Dense) -> Callable[[], None]:
        model = copy.deepcopy(method.model).eval()

        @torch.inference_mode()
        def some() -> None:
            for _ in range(PERIOD):
                model(**batch)

        return some

    calls = {
        "inference of dense": inference(dense),
        "inference": inference(final),
        "dense": steps(dense),
        "first": steps(first),
        "last": steps(last),
    }
    seconds = interleaved(calls, rounds, warmup=1 if rounds > 1 else 0)
    return {
        "first": ratio(seconds["first"], seconds["dense"]),
        "last": ratio(seconds["last"], seconds["dense"]),
        "inference": ratio(seconds["inference"], seconds["inference of dense"]),
    }
