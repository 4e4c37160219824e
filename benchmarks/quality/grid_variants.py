"""What was tried to make `form="grid"` better: variants of it at equal parameters, on trainings of 300 steps.

    python benchmarks/quality/grid_variants.py                # run what is missing, then print the table
    python benchmarks/quality/grid_variants.py --minutes 0    # only the table

All variants get a first look: one seed at one rate on both digits tasks. The best two get three rates on two seeds,
and eight other seeds at the best ones, beside `grid`, which is `grid_pairs="separate"`, and LoRA. Cells are kept in
results/grid_variants/.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from quality import run
from quality.cells import Cell, Store
from quality.comparison import interval, paired
from quality.methods import LORA, METHODS
from quality.plan import BUDGET, FIRST_RATES, TUNING_SEEDS, Entry, Results, rate
from quality.tasks.digits import Digits
from quality.tasks.planted import SPATIAL, Planted
from quality.tasks.task import Task
from quality.training import Built, Problem, trained_parameters
from wara_peft import WaRAConfig
from wara_peft.forms.grid import GridFactor
from wara_peft.forms.token_mixing import TokenMixing
from wara_peft.layers.base import WaRALayer

SEEDS = range(8)
KEPT = 2
FIRST_LOOK = 0.01
"""The rate that is best for `grid` and for LoRA on both digits tasks."""
GRID = "grid"
WAVEFT = "WaveFT"
RATES = tuple(rate(step) for step in FIRST_RATES)
MORE_RATES = {WAVEFT: (rate(FIRST_RATES[0] - 1),)}
"""Its best rates on shorter trainings lie lower than those of the others."""


@dataclass(frozen=True)
class Longer(Digits):
    """`Digits` under a name that tells its steps."""

    @property
    def name(self) -> str:
        return f"{super().name}, {self.steps} steps"


DIGITS: list[Task] = [Longer(40, domain, 12, 300) for domain in ("clean", "inverted")]
TASKS: dict[str, Task] = {task.name: task for task in [*DIGITS, Planted(SPATIAL)]}


def everywhere(module_name: str) -> bool:
    return True


@dataclass(frozen=True)
class Part:
    """One adapter: its ranks by subband, the layers that it adapts, and what else its config says."""

    ranks: dict[str, int]
    form: str = "grid"
    adapts: Callable[[str], bool] = everywhere
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """Adapters that are active at once, with as many parameters as LoRA of rank 4.

    Attributes:
        parts: the adapters.
        prepare: called with the adapted model; may return what to do after each step.
        on_one_layer: whether it has a meaning for the model of the planted filter.
    """

    name: str
    parts: tuple[Part, ...]
    prepare: Callable[[PeftModel], Callable[[int], object] | None] | None = None
    on_one_layer: bool = True
    group = "WaRA"
    sized = True

    def applies(self, task: Task) -> bool:
        return self.on_one_layer or task.attention == "vit"

    def build(self, problem: Problem, budget: float) -> Built:
        targets = [name for name, _ in problem.model.named_modules() if name.rpartition(".")[2] in problem.targets]
        configs = [
            WaRAConfig(
                form=part.form,
                subband_ranks=part.ranks,
                target_modules=[name for name in targets if part.adapts(name)],
                **part.fields,
                **({"grid_pairs": "separate", **problem.grid} if part.form == "grid" else {}),
            )
            for part in self.parts
        ]
        configs[0].modules_to_save = problem.head or None
        model = get_peft_model(problem.model, configs[0], "part0")
        for number, config in enumerate(configs[1:], 1):
            model.add_adapter(f"part{number}", config)
        for layer in model.modules():
            if isinstance(layer, WaRALayer):
                layer.set_adapter(list(layer.wara_A))
        after_step = self.prepare(model) if self.prepare else None
        return Built(model, trained_parameters(model, problem.head), *([after_step] if after_step else []))


def one(name: str, prepare: Callable[[PeftModel], Any] | None = None, levels: int = 1, **fields: Any) -> Variant:
    """`grid` with a pair of rank one for each of four subbands, as `run.py` makes it for this budget."""
    ranks = {"aa": 1, "dd": 1, "ad": 1, "da": 1}
    bands = {f"{band}{level}": ranks[band] * (level == levels) for level in range(1, levels + 1) for band in ranks}
    bands = {band: rank for band, rank in bands.items() if band[:2] != "aa" or band == f"aa{levels}"}
    return Variant(name, (Part(bands, fields={"levels": levels, **fields}),), prepare)


def of_details(model: PeftModel) -> list[tuple[Tensor, Tensor]]:
    """For each layer a view of A's rows and one of B's columns that belong to detail bands."""
    found = []
    for layer in model.modules():
        for adapter, a in layer.wara_A.items() if isinstance(layer, WaRALayer) else ():
            if isinstance(a, GridFactor):
                coarse = a.ranks.get("aa1", 0)
                found.append((a.weight.data[coarse:], layer.wara_B[adapter].weight.data[:, coarse:]))
    return found


def smaller_details(factor: float) -> Callable[[PeftModel], None]:
    """A of the detail bands starts at `factor` of its usual size."""

    def prepare(model: PeftModel) -> None:
        for rows, _ in of_details(model):
            rows.mul_(factor)

    return prepare


def slower_details(factor: float) -> Callable[[PeftModel], Callable[[int], object]]:
    """Detail bands take `factor` of each of AdamW's steps, which is what a rate of their own would be."""

    def prepare(model: PeftModel) -> Callable[[int], object]:
        views = [view for pair in of_details(model) for view in pair]
        before = [view.clone() for view in views]

        def after_step(step: int) -> None:
            for view, old in zip(views, before, strict=True):
                view.copy_(old.lerp(view, factor))
                old.copy_(view)

        return after_step

    return prepare


class AllBandsOfPrefix(TokenMixing):
    """Prefix tokens, which lie on no grid, keep the channels of all bands and not only of the coarsest."""

    def __call__(self, hidden: Tensor, gain: Tensor | None = None) -> Tensor:
        prefix = self._split(hidden)[0]
        return torch.cat((hidden[:, :prefix], super().__call__(hidden, gain)[:, prefix:]), 1)


def whole_prefix(model: PeftModel) -> None:
    for layer in model.modules():
        if isinstance(layer, WaRALayer):
            for name, mixing in layer.token_mixing.items():
                layer.token_mixing[name] = AllBandsOfPrefix(
                    mixing.module_name, mixing.grid, mixing.wavelet, mixing.channels
                )


def undecomposed(rank: int, adapts: Callable[[str], bool] = everywhere) -> Part:
    """Plain LoRA, which `subband` is where the undecomposed matrix alone has a rank."""
    return Part({"aa0": rank, "aa1": 0, "ad1": 0, "da1": 0, "dd1": 0}, "subband", adapts)


def beside(name: str, rank: int, prepare: Callable[[PeftModel], Any] | None = None, **ranks: int) -> Variant:
    """An undecomposed pair on all tokens beside `grid` of these ranks."""
    return Variant(name, (undecomposed(rank), Part({"aa1": 0, "ad1": 0, "da1": 0, "dd1": 0} | ranks)), prepare)


def only(name: str, adapts: Callable[[str], bool]) -> Variant:
    """`grid` on some layers, LoRA on the others."""
    ranks = {"aa1": 1, "ad1": 1, "da1": 1, "dd1": 1}
    others = undecomposed(4, lambda module_name: not adapts(module_name))
    return Variant(name, (Part(ranks, adapts=adapts), others), on_one_layer=False)


def is_mlp(module_name: str) -> bool:
    return module_name.endswith(("fc1", "fc2"))


def of_layer(number: int) -> Callable[[str], bool]:
    return lambda module_name: f".{number}." in module_name


VARIANTS = [
    one("prefix tokens in all bands", whole_prefix),
    beside("beside LoRA r=2: aa1, dd1", 2, aa1=1, dd1=1),
    beside("beside LoRA r=2: ad1, da1", 2, ad1=1, da1=1),
    beside("beside LoRA r=1: details", 1, ad1=1, da1=1, dd1=1),
    beside("beside LoRA r=1: details, prefix tokens in all", 1, whole_prefix, ad1=1, da1=1, dd1=1),
    beside("beside LoRA r=1: details that start at 0.5", 1, smaller_details(0.5), ad1=1, da1=1, dd1=1),
    one("details start at 0.5", smaller_details(0.5)),
    one("details start at 0.25", smaller_details(0.25)),
    one("details learn at 0.3", slower_details(0.3)),
    one("details learn at 0.1", slower_details(0.1)),
    one("2 levels", levels=2),
    one("3 levels", levels=3),
    one("db2", wavelet="db2"),
    only("attention only, LoRA on the MLPs", lambda name: not is_mlp(name)),
    only("MLPs only, LoRA on attention", is_mlp),
    only("first layer only, LoRA elsewhere", of_layer(0)),
    only("last layer only, LoRA elsewhere", of_layer(2)),
    Variant("aa1 of rank 2, ad1, da1", (Part({"aa1": 2, "ad1": 1, "da1": 1, "dd1": 0}),)),
]
METHODS_HERE = {method.name: method for method in (one(GRID), METHODS[LORA], *VARIANTS, METHODS[WAVEFT])}


def rates(method: str) -> tuple[float, ...]:
    return (*MORE_RATES.get(method, ()), *RATES)


def entry(task: Task, method: str) -> Entry:
    return Entry(task.name, method, BUDGET)


def first_look(method: str) -> list[Cell]:
    """One seed at one rate on both digits tasks."""
    return [entry(task, method).cell(FIRST_LOOK, TUNING_SEEDS[0]) for task in DIGITS]


def looked(results: Results, method: str) -> float:
    """Mean validation of the first look."""
    return statistics.mean(results[cell]["validation"] or 0.0 for cell in first_look(method))


def kept(results: Results) -> list[str]:
    """The variants that are best at first look, best first."""
    return sorted((variant.name for variant in VARIANTS), key=lambda name: -looked(results, name))[:KEPT]


def tuning_cells(method: str) -> list[Cell]:
    tasks = [task for task in TASKS.values() if METHODS_HERE[method].applies(task)]
    return [entry(task, method).cell(rate, seed) for seed in TUNING_SEEDS for task in tasks for rate in rates(method)]


def tuned(results: Results, method: str) -> bool:
    return all(cell in results for cell in tuning_cells(method))


def validation(results: Results, task: Task, method: str) -> tuple[float, float]:
    """Best mean over the tuning seeds, larger being better, and its rate."""
    sign = 1 if task.higher_is_better else -1

    def mean(rate: float) -> float:
        values = [results[entry(task, method).cell(rate, seed)]["validation"] for seed in TUNING_SEEDS]
        return -float("inf") if None in values else sign * statistics.mean(values)

    best = max(rates(method), key=mean)
    return mean(best), best


def reported_cells(results: Results, methods: list[str]) -> list[Cell]:
    return [
        entry(task, name).cell(validation(results, task, name)[1], seed)
        for seed in SEEDS
        for name in methods
        for task in TASKS.values()
        if METHODS_HERE[name].applies(task)
    ]


def pending(results: Results) -> list[Cell]:
    """Cells that can run now: first looks, rates of those that are kept, their other seeds, LoRA's, and WaveFT."""
    steps: list[Callable[[], list[Cell]]] = [
        lambda: [cell for variant in VARIANTS for cell in first_look(variant.name)],
        lambda: [cell for name in (GRID, LORA, *kept(results)) for cell in tuning_cells(name)],
        lambda: reported_cells(results, [GRID, *kept(results)]),
        lambda: reported_cells(results, [LORA]),
        lambda: tuning_cells(WAVEFT),
        lambda: reported_cells(results, [WAVEFT]),
    ]
    for step in steps:
        if missing := [cell for cell in step() if cell not in results]:
            return missing
    return []


def shown(value: float, task: Task) -> str:
    return f"{100 * value:.1f}" if task.higher_is_better else f"{abs(value):.3f}"


def tuning_table(results: Results) -> str:
    """The first look, and validation over both tuning seeds at the best rate, in brackets, of those that were kept."""
    lines = ["| variant | first look | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 2) + "|"]
    for name, method in METHODS_HERE.items():
        look = f"{100 * looked(results, name):.1f}" if all(cell in results for cell in first_look(name)) else ""
        found = [""] * len(TASKS)
        if tuned(results, name):
            for place, task in enumerate(TASKS.values()):
                if method.applies(task):
                    value, best = validation(results, task, name)
                    found[place] = f"{shown(value, task)} ({best:g})"
        lines.append(f"| {name} | {look} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def test_table(results: Results) -> str:
    """Test figures over the other seeds, and paired differences to `grid`."""
    lines = ["| task | variant | rate | test | paired difference to grid | p | seeds |", "|---" * 7 + "|"]
    for task in TASKS.values():
        scale, digits = (100.0, 1) if task.higher_is_better else (1.0, 3)
        baseline: dict[int, float] = {}
        for name in [GRID, *kept(results), LORA, WAVEFT] if tuned(results, GRID) else []:
            if not tuned(results, name) or not METHODS_HERE[name].applies(task):
                continue
            best = validation(results, task, name)[1]
            cells = {seed: entry(task, name).cell(best, seed) for seed in SEEDS}
            tests = {seed: results[cell]["test"] for seed, cell in cells.items() if cell in results}
            baseline = baseline or tests
            if len(tests) < 2:
                continue
            mean, half = scale * statistics.mean(tests.values()), scale * interval(list(tests.values()))
            row = f"| {task.name} | {name} | {best:g} | {mean:.{digits}f} ± {half:.{digits}f} |"
            difference = None if name == GRID else paired(tests, baseline)
            if difference:
                by, wide = scale * difference.mean, scale * difference.interval
                row += f" {by:+.{digits}f} ± {wide:.{digits}f} | {difference.p:.3f} | {difference.pairs} |"
            else:
                row += f"  |  | {len(tests)} |"
            lines.append(row)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time that it may take (default: no end)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # said once for each of many models; none is about what is measured
    logging.disable(logging.WARNING)
    METHODS.update(METHODS_HERE)  # where `run_cell` looks
    store = Store(run.RESULTS / "grid_variants", run.CACHE / "locks")
    failed = run.work(lambda: pending(store.results()), TASKS, store, args.minutes) if args.minutes else 0
    print(tuning_table(store.results()), end="\n\n")
    print(test_table(store.results()))
    if failed:
        sys.exit("grid_variants.py: error: some cells failed, see above")


if __name__ == "__main__":
    main()
