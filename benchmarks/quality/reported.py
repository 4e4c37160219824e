"""What may be reported of the results: test figures at the rates chosen on validation, beside LoRA's at equal size."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quality import plan
from quality.comparison import Difference, holm, paired
from quality.methods import LORA, METHODS
from quality.plan import Entry, Results
from quality.tasks import TASKS


@dataclass(frozen=True)
class Reported:
    """A method on a task at a budget.

    Attributes:
        rate: the learning rate that was chosen.
        parameters: trained, without the head.
        tests: metric on the test split by seed, over the seeds that did not choose the rate.
        diverged: how many of these seeds have no metric.
        disputed: whether further seeds, which have not been run, may change the rate.
    """

    task: str
    method: str
    budget: float
    rate: float
    parameters: int
    tests: dict[int, float]
    diverged: int
    disputed: bool = False


def mean(values: Mapping[int, float]) -> float:
    return statistics.mean(values.values())


def reported(results: Results, seeds: Mapping[str, Iterable[int]] = plan.SEEDS) -> dict[str, list[Reported]]:
    """All that can be reported, by task, in the order of methods and budgets."""
    found: dict[str, list[Reported]] = {name: [] for name in TASKS}
    for name, task in TASKS.items():
        for method in METHODS:
            for budget in sorted({cell.budget for cell in results if (cell.task, cell.method) == (name, method)}):
                entry = Entry(name, method, budget)
                tuning = plan.tuning(entry, results, task.higher_is_better)
                rate = tuning.chosen
                if rate is None:
                    continue
                runs = {
                    seed: results[cell] for seed in seeds[entry.family] if (cell := entry.cell(rate, seed)) in results
                }
                tests = {seed: run["test"] for seed, run in runs.items() if run["test"] is not None}
                if tests:
                    parameters = next(iter(runs.values()))["parameters"]
                    row = Reported(
                        name, method, budget, rate, parameters, tests, len(runs) - len(tests), bool(tuning.further)
                    )
                    found[name].append(row)
    return found


@dataclass(frozen=True)
class Compared:
    """A method's difference to LoRA at equal parameters, with Holm's adjusted p; the ends have none."""

    row: Reported
    difference: Difference | None
    adjusted: float | None
    tasks: int = 1
    """How many tasks the row is the mean of."""


def compared(rows: list[Reported]) -> list[Compared]:
    """The rows of one task, each beside LoRA's of its budget; Holm's correction over a budget's methods."""
    result = []
    for budget in dict.fromkeys(row.budget for row in rows):
        of_budget = [row for row in rows if row.budget == budget]
        baseline = next((row for row in of_budget if row.method == LORA), None)
        differences = {
            row.method: paired(row.tests, baseline.tests) if baseline and row is not baseline else None
            for row in of_budget
        }
        adjusted = holm({name: difference.p for name, difference in differences.items() if difference})
        result += [Compared(row, differences[row.method], adjusted.get(row.method)) for row in of_budget]
    return result


def pooled(found: Mapping[str, list[Reported]], family: str) -> list[Compared]:
    """A family's tasks as one: by seed the mean over the tasks that a method has, LoRA's over the same ones.

    The rows carry the mean over tasks; parameters are those of one of them, and there is no one rate.
    """
    tasks = [name for name in found if name.partition("/")[0] == family]
    rows = {(row.task, row.method, row.budget): row for name in tasks for row in found[name]}
    result = []
    for budget in dict.fromkeys(budget for _, _, budget in rows):
        differences: dict[str, Difference | None] = {}
        means: dict[str, tuple[Reported, int]] = {}
        for method in METHODS:
            having = [name for name in tasks if (name, method, budget) in rows and (name, LORA, budget) in rows]
            if not having:
                continue
            own, lora = (by_seed([rows[name, of, budget].tests for name in having]) for of in (method, LORA))
            if not own:
                continue
            differences[method] = None if method == LORA else paired(own, lora)
            first = rows[having[0], method, budget]
            diverged = sum(rows[name, method, budget].diverged for name in having)
            row = Reported(family, method, budget, float("nan"), first.parameters, own, diverged)
            means[method] = row, len(having)
        adjusted = holm({name: difference.p for name, difference in differences.items() if difference})
        result += [Compared(row, differences[name], adjusted.get(name), tasks) for name, (row, tasks) in means.items()]
    return result


def by_seed(tests: list[dict[int, float]]) -> dict[int, float]:
    """Means over tasks of the seeds that all of them have."""
    seeds = set.intersection(*(set(of_task) for of_task in tests))
    return {seed: statistics.mean(of_task[seed] for of_task in tests) for seed in sorted(seeds)}
