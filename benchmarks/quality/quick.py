"""What `--quick` runs: tiny tasks of each kind of model, with a method of each group."""

from __future__ import annotations

from collections.abc import Iterable

from quality.plan import BUDGET, Entry, entries
from quality.tasks.digits import Digits
from quality.tasks.planted import Planted
from quality.tasks.task import Task

SEEDS = (0, 1)
TASKS: dict[str, Task] = {
    task.name: task for task in (Digits(8, "clean", 8, 4, pretraining_epochs=1, judged=50), Planted("low-rank", 60))
}
METHODS = (
    "LoRA",
    "AdaLoRA",
    "WaRA subband, haar, 1",
    "WaRA subband, ranks by gradient",
    "WaRA grid",
    "Linformer",
    "full fine-tuning",
    "frozen",
)


def wanted() -> list[tuple[Entry, Iterable[int]]]:
    return [(entry, SEEDS) for entry in entries(TASKS.values(), METHODS, BUDGET)]
