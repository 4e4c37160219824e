"""Which cells a stage needs, given those that are finished: learning rates first, then the seeds that are reported."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quality.cells import Cell
from quality.methods import DEFAULT, LORA, METHODS, RULES
from quality.tasks import TASKS, Task
from quality.tasks.digits import Digits

Results = Mapping[Cell, dict[str, Any]]

TUNING_SEEDS = (100, 101)
"""Learning rates are chosen on the validation split of these, and nothing else of them is reported."""
FURTHER_SEEDS = (102, 103)
"""They decide between the best two rates where these differ by no more than noise on the tuning seeds."""
NOISE = 2.0
"""Standard errors of a paired difference, over the tuning seeds, within which two rates do not differ."""
FIRST_RATES = (-5, -4, -3)
"""Half decades: 3e-3, 1e-2, 3e-2. The same for all methods."""
OF_TRANSLATION = ((100,), (-6, -5, -4))
"""Tuning seeds and first rates of translation: a cell takes minutes, and its model has been trained already."""
STAGES = (1, 2, 3, 4, 5, 6, 7)
SETTLING = 6
"""The stage that runs further seeds."""
WIDENINGS = 4
"""How often the grid grows by a step where the best rate lies on its edge."""
SEEDS = {
    "digits": range(8),
    "digits-long": range(8),
    "conv": range(8),
    "planted": range(5),
    "docstrings": range(5),
    "language": range(5),
    "translation": range(3),
}
BUDGET = 4.0
BUDGETS = (4.0, 1.0, 16.0, 0.25)
"""In LoRA's ranks, the one of all stages first."""
LAST = 2**31
"""More than any seed."""
ADAPTERS = ("WaRA", "peer", "ranks")
"""Groups of methods that are ranked."""
SELECTED_OF_A_GROUP = 3
FINALISTS = 4
NOT_SELECTED = ("MiSS", "GraLoRA")
"""Peers that the README's table names though stage one did not select them: who reads it asks for them."""
TRANSLATED_BY = (LORA, "rsLoRA", DEFAULT, *NOT_SELECTED)
RANK_BUDGETS = (2.0, 8.0)
SPREAD_ON_TEXT = 4


def rate(half_decades: int) -> float:
    return float(f"{(1, 3)[half_decades % 2]}e{half_decades // 2}")


@dataclass(frozen=True)
class Entry:
    """A point of a table: a method on a task at a budget."""

    task: str
    method: str
    budget: float

    def cell(self, rate: float, seed: int) -> Cell:
        return Cell(self.task, self.method, self.budget, rate, seed)

    @property
    def family(self) -> str:
        return self.task.partition("/")[0]


def entries(tasks: Iterable[Task], methods: Iterable[str], budget: float) -> list[Entry]:
    """The methods that apply, at a budget; those without a size have none."""
    return [
        Entry(task.name, name, budget if METHODS[name].sized else 0.0)
        for task in tasks
        for name in methods
        if METHODS[name].applies(task)
    ]


def fits(entry: Entry, results: Results) -> bool:
    """False once a run has told that the method's smallest size is above the budget."""
    seeds, rates = first_choice(entry.family)
    first = results.get(entry.cell(rate(rates[0]), seeds[0]))
    return first is None or first["parameters"] is not None


def first_choice(family: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the seeds that choose the rate of a family's tasks, and the half decades of the rates to begin with."""
    return OF_TRANSLATION if family == "translation" else (TUNING_SEEDS, FIRST_RATES)


@dataclass(frozen=True)
class Tuning:
    """What is known of an entry's rate.

    Attributes:
        missing: cells that the choice needs.
        chosen: the rate, None while cells are missing.
        means: validation's mean over the tuning seeds by rate.
        further: cells of further seeds that may change the choice.
    """

    missing: list[Cell]
    chosen: float | None
    means: dict[float, float]
    further: list[Cell]

    def first_choice(self, higher_is_better: bool) -> float:
        """The rate that the tuning seeds choose, without further ones: what methods are selected by."""
        return (max if higher_is_better else min)(self.means, key=lambda rate: self.means[rate])


def tuning(entry: Entry, results: Results, higher_is_better: bool) -> Tuning:
    """Choose the best rate of the grid, after it has grown until the best is not on its edge.

    Where the best two do not differ by more than noise, the mean over further seeds as well decides between them;
    until these are run the choice stands. Among equals the smaller rate is taken. A single tuning seed tells no noise.
    """
    if not fits(entry, results):
        return Tuning([], None, {}, [])
    tuning_seeds, first_rates = first_choice(entry.family)
    grid = list(first_rates)
    widened = 0

    def mean(step: int, seeds: Iterable[int]) -> float:
        return validation(entry, results, rate(step), seeds, higher_is_better)

    while True:
        missing = [cell for cell in cells_of(entry, grid, tuning_seeds) if cell not in results]
        if missing:
            return Tuning(missing, None, {}, [])
        means = {step: mean(step, tuning_seeds) for step in grid}
        best, second = sorted(grid, key=lambda step: (-means[step], step))[:2]
        further: list[Cell] = []
        if results[entry.cell(rate(grid[0]), tuning_seeds[0])]["parameters"] == 0 and len(set(means.values())) == 1:
            best = grid[len(grid) // 2]  # nothing trains
        elif len(tuning_seeds) > 1 and (best not in (grid[0], grid[-1]) or widened == WIDENINGS):
            apart = [mean(best, [seed]) - mean(second, [seed]) for seed in tuning_seeds]
            if means[second] > -math.inf and within_noise(apart):
                further = [cell for cell in cells_of(entry, (best, second), FURTHER_SEEDS) if cell not in results]
                if not further:
                    seeds = (*tuning_seeds, *FURTHER_SEEDS)
                    best = min(best, second, key=lambda step: (-mean(step, seeds), step))
        if best not in (grid[0], grid[-1]) or widened == WIDENINGS:
            sign = 1 if higher_is_better else -1
            return Tuning([], rate(best), {rate(step): sign * mean for step, mean in means.items()}, further)
        grid = [best - 1, *grid] if best == grid[0] else [*grid, best + 1]
        widened += 1


def within_noise(differences: list[float]) -> bool:
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return round(statistics.mean(differences) - NOISE * error, 12) <= 0


def cells_of(entry: Entry, steps: Iterable[int], seeds: Iterable[int]) -> list[Cell]:
    steps = list(steps)
    return [entry.cell(rate(step), seed) for seed in seeds for step in steps]


def validation(entry: Entry, results: Results, rate: float, seeds: Iterable[int], higher_is_better: bool) -> float:
    """Mean over seeds, larger being better; a run that did not end is worse than any other."""
    found = [results[entry.cell(rate, seed)]["validation"] for seed in seeds]
    if any(value is None for value in found):
        return -math.inf
    mean = round(statistics.mean(found), 12)  # means of equal counts are equal, in whatever order they are added
    return mean if higher_is_better else -mean


def pending(
    wanted: list[tuple[Entry, Iterable[int]]],
    results: Results,
    tasks: Mapping[str, Task] = TASKS,
    further: bool = False,
) -> list[Cell]:
    """Cells that can run now, in order: budget by budget, and of a budget what can be reported before what cannot yet.

    What can be reported comes seed by seed, so that methods whose rate is chosen have the same seeds when it ends.

    Args:
        further: whether the further seeds of disputed rates are wanted, too; then it goes point by point.
    """
    ordered: list[tuple[int, int, Cell]] = []
    for entry, seeds in wanted:
        budget = BUDGETS.index(entry.budget) if entry.budget in BUDGETS else 0  # the ends belong to the first
        found = tuning(entry, results, tasks[entry.task].higher_is_better)
        ordered += [(budget, LAST, cell) for cell in found.missing + (found.further if further else [])]
        if found.chosen is not None:
            cells = [entry.cell(found.chosen, seed) for seed in seeds]
            ordered += [(budget, cell.seed, cell) for cell in cells if cell not in results]
    if not further:
        ordered.sort(key=lambda item: item[:2])  # stable
    return [cell for _, _, cell in ordered]


def stage_one() -> list[tuple[Entry, Iterable[int]]]:
    """Every method at one budget, on the tuning seeds alone: it selects, and reports nothing."""
    tasks = quick_ones(of_families("planted", "digits"))
    methods = [name for name, method in METHODS.items() if method.group not in ("rule", "ranks", "later")]
    return [(entry, ()) for entry in entries(tasks, methods, BUDGET)]


def stage_two(results: Results) -> list[tuple[Entry, Iterable[int]]]:
    """LoRA, WaRA's default and what was selected, at the first budget also the ends and other attention.

    On images the short trainings have the first budget alone, and decide what is trained longer, at all budgets.
    """
    found = stage_two_first(results)
    families = of_families("conv", "planted")
    found += [entry for budget in BUDGETS[1:] for entry in entries(families, adapters(results), budget)]
    if not pending(with_seeds(of_second_selection(found)), results):
        best = of_images(results)
        tasks = of_families("digits-long")
        found += entries(tasks, [*best, *of_group("attention"), *of_group("end")], BUDGET)
        found += [entry for budget in BUDGETS[1:] for entry in entries(tasks, best, budget)]
    return with_seeds(found)


def stage_two_first(results: Results) -> list[Entry]:
    methods = [*adapters(results), *of_group("end"), *of_group("attention")]
    return entries(of_families("digits", "conv", "planted"), methods, BUDGET)


def with_seeds(wanted: list[Entry]) -> list[tuple[Entry, Iterable[int]]]:
    return [(entry, SEEDS[entry.family]) for entry in wanted]


def adapters(results: Results) -> list[str]:
    """LoRA, WaRA's default and what stage one selected, in the order of `METHODS`."""
    return [name for name in METHODS if name in {LORA, DEFAULT, *selected(results)}]


def stage_three(results: Results) -> list[tuple[Entry, Iterable[int]]]:
    """The finalists with LoRA and the ends, at one budget, on text."""
    methods = [LORA, *finalists(results), *of_group("end")]
    return with_seeds(entries(of_families("docstrings", "language"), methods, BUDGET))


def stage_four(results: Results) -> list[tuple[Entry, Iterable[int]]]:
    """Ways to spread a budget over modules, on images; then the best four with the two even ones on text."""
    tasks = [task for task in of_families("digits") if isinstance(task, Digits) and task.domain != "shifted"]
    methods = [LORA, DEFAULT, "AdaLoRA", *of_group("ranks")]
    images = [entry for budget in RANK_BUDGETS for entry in entries(tasks, methods, budget)]
    found = with_seeds(images)
    if not pending(found, results):
        order = [name for name in ranking(results, images, SEEDS) if name not in (LORA, DEFAULT)]
        text = [TASKS["language/sympy"], *of_families("docstrings")]
        found += with_seeds(entries(text, [LORA, DEFAULT, *order[:SPREAD_ON_TEXT]], BUDGET))
    return found


def stage_five() -> list[tuple[Entry, Iterable[int]]]:
    """Peers that no stage before selected, on the long trainings."""
    tasks = of_families("digits-long")
    return with_seeds([entry for budget in BUDGETS[:3] for entry in entries(tasks, NOT_SELECTED, budget)])


def stage_six(results: Results) -> list[tuple[Entry, Iterable[int]]]:
    """All points that are reported, to settle disputed rates; first the long trainings, of these r=16."""
    found = dict.fromkeys(
        Entry(cell.task, cell.method, cell.budget)
        for cell in results
        if cell.method in METHODS and METHODS[cell.method].group != "rule" and cell.seed in SEEDS[cell.family]
        if cell.family != "translation"
    )

    def later(entry: Entry) -> tuple[bool, ...]:
        return entry.family != "digits-long", entry.budget not in BUDGETS[:3], entry.budget != 16, entry.method != LORA

    return with_seeds(sorted(found, key=later))


def stage_seven() -> list[tuple[Entry, Iterable[int]]]:
    """A real model: all at the parameters of LoRA r=4, three of them at r=1 and 16; WaveFT at r=1, and all weights."""
    tasks = of_families("translation")
    found = entries(tasks, TRANSLATED_BY, BUDGET)
    for budget in (1.0, 16.0):
        found += entries(tasks, TRANSLATED_BY[:3], budget)
    return with_seeds([*found, *entries(tasks, ["WaveFT"], 1.0), *entries(tasks, ["full fine-tuning"], BUDGET)])


def rule_cells(results: Results) -> dict[Entry, dict[int, Cell]]:
    """WaRA at the rate that LoRA chose, with its scaling as it is and as a rule makes it, by seed.

    Of the tasks of stage two on which LoRA has chosen its rate.
    """
    found = {}
    for entry in entries(of_families("digits", "conv", "planted"), [*RULES, *RULES.values()], BUDGET):
        lora = Entry(entry.task, LORA, BUDGET)
        rate = tuning(lora, results, TASKS[entry.task].higher_is_better).chosen
        if rate is not None:
            found[entry] = {seed: entry.cell(rate, seed) for seed in SEEDS[entry.family]}
    return found


def stage(number: int, results: Results) -> list[tuple[Entry, Iterable[int]]]:
    """What a stage wants.

    Raises:
        ValueError: a stage that selects for this one has cells left.
    """
    if number == 1:
        return stage_one()
    if number == 4:
        return stage_four(results)
    if number == SETTLING:
        return stage_six(results)
    if number == 5:
        return stage_five()
    if number == 7:
        return stage_seven()
    if number == 2:
        require(1, stage_one(), results)
        return stage_two(results)
    require(2, with_seeds(of_second_selection(stage_two_first(results))), results)
    return stage_three(results)


def require(number: int, wanted: list[tuple[Entry, Iterable[int]]], results: Results) -> None:
    left = len(pending(wanted, results))
    if left:
        raise ValueError(f"stage {number} has {left} or more cells left; run `run.py --stage {number}` first.")


def of_families(*names: str) -> list[Task]:
    return [task for task in TASKS.values() if task.name.partition("/")[0] in names]


def quick_ones(tasks: list[Task]) -> list[Task]:
    """What methods are selected by: of the digits those with eight a class, which train in half of the time."""
    return [task for task in tasks if not isinstance(task, Digits) or task.per_class == 8]


def of_second_selection(wanted: list[Entry]) -> list[Entry]:
    """The points of stage two that choose the finalists: adapters at the first budget."""
    names = {task.name for task in quick_ones(list(TASKS.values()))}
    return [
        entry
        for entry in wanted
        if entry.budget == BUDGET and entry.task in names and METHODS[entry.method].group in ADAPTERS
    ]


def of_group(group: str) -> list[str]:
    return [name for name, method in METHODS.items() if method.group == group]


def ranking(results: Results, wanted: list[Entry], seeds: Mapping[str, Iterable[int]] | None = None) -> list[str]:
    """Adapters from the best, by place on validation splits: 0 the first, 1 the last of those that a task takes.

    Places are averaged over a family's tasks, and then over the families that a method applies to.

    Args:
        wanted: the entries to look at.
        seeds: of each family; None means the tuning seeds.
    """
    places: dict[str, dict[str, list[float]]] = {}
    for task, budget in dict.fromkeys((entry.task, entry.budget) for entry in wanted):
        values = {}
        for entry in wanted:
            if (entry.task, entry.budget) != (task, budget) or METHODS[entry.method].group not in ADAPTERS:
                continue
            higher = TASKS[task].higher_is_better
            found = tuning(entry, results, higher)
            if found.chosen is None:
                continue
            if seeds is None:
                value = found.means[found.first_choice(higher)]
            else:
                value = statistics.mean(
                    results[entry.cell(found.chosen, seed)]["validation"] for seed in seeds[entry.family]
                )
            values[entry.method] = value if higher else -value
        for name, value in values.items():
            # Half of those it ties with count as better.
            better = (
                sum(other > value for other in values.values())
                + (sum(other == value for other in values.values()) - 1) / 2
            )
            family = task.partition("/")[0]
            places.setdefault(name, {}).setdefault(family, []).append(better / max(1, len(values) - 1))
    means = {
        name: statistics.mean(statistics.mean(of_family) for of_family in families.values())
        for name, families in places.items()
    }
    return sorted(means, key=lambda name: means[name])


def selected(results: Results) -> list[str]:
    """The best three WaRA adapters and the best three peers of stage one, in the order of `METHODS`."""
    order = ranking(results, [entry for entry, _ in stage_one()])
    chosen = {
        name
        for group in ("WaRA", "peer")
        for name in [name for name in order if METHODS[name].group == group and name != LORA][:SELECTED_OF_A_GROUP]
    }
    return [name for name in METHODS if name in chosen]


def finalists(results: Results) -> list[str]:
    """WaRA's default and the best three others of stage two at the first budget, of those that text can use."""
    text = of_families("docstrings", "language")
    order = ranking(results, of_second_selection(stage_two_first(results)), SEEDS)
    return with_default([name for name in order if all(METHODS[name].applies(task) for task in text)])


def of_images(results: Results) -> list[str]:
    """LoRA, WaRA's default and the best three others of the short trainings on images."""
    looked_at = [entry for entry in of_second_selection(stage_two_first(results)) if entry.family == "digits"]
    return [LORA, *with_default(ranking(results, looked_at, SEEDS))]


def with_default(order: list[str]) -> list[str]:
    chosen = {DEFAULT, *[name for name in order if name not in (LORA, DEFAULT)][: FINALISTS - 1]}
    return [name for name in METHODS if name in chosen]
