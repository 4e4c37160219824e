"""What `compress_and_heal.py` shows of its measurements: tables, and a picture."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# The statistics are those of the benchmarks.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality.comparison import interval, paired

Line = Mapping[str, Any]
SEEDS, TUNING_SEEDS = range(5), range(100, 102)
"""Those that are reported, and those that learning rates were chosen on."""
HEALING = ("LoRA on factors", "WaRA on factors", "WaRA on layers")


def tasks(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by task."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["task"].partition("/")[2], []).append(line)
    return found


def table(lines: Iterable[Line]) -> str:
    """Of each task what compressing leaves, by budget, and what healing makes of it over the seeds."""
    parts = []
    for task, own in tasks(lines).items():
        parts += [f"**{task}**, {own[0]['metric']}", compressing_table(own), healing_table(own)]
    return "\n\n".join(parts)


def compressing_table(own: Sequence[Line]) -> str:
    """A row for each solver and allocation, a column for each share of the targets' parameters that is kept."""
    values = {(line["solver"], line["allocation"], line["budget"]): line for line in own if not line["healed_with"]}
    budgets = sorted({budget for solver, _, budget in values if solver != "dense"}, reverse=True)
    dense = f"{values['dense', '', 1.0]['test']:.2f}"
    lines = [
        f"| solver | ranks | {' | '.join(f'{budget:.0%} kept' for budget in budgets)} |",
        "|---" * (len(budgets) + 2) + "|",
        f"| dense |  | {' | '.join([dense] * len(budgets))} |",
    ]
    for solver, allocation in dict.fromkeys((solver, allocation) for solver, allocation, _ in values):
        if solver != "dense":
            found = [values.get((solver, allocation, budget)) for budget in budgets]
            shown = [f"{line['test']:.2f}" if line else "" for line in found]
            lines.append(f"| {solver} | {allocation} | {' | '.join(shown)} |")
    return "\n".join(lines)


def healing_table(own: Sequence[Line]) -> str:
    """Means over seeds with 95 % intervals, and differences to LoRA's at equal seeds."""
    digits = ".3f" if is_perplexity(own) else ".2f"
    found: dict[tuple[str, str, str], list[Line]] = {}
    for line in own:
        if line["healed_with"]:
            found.setdefault((line["solver"], line["allocation"], line["healed_with"]), []).append(line)
    lines = [
        f"| healed | ranks | with | rate | its parameters | {own[0]['metric']} | minus LoRA's |",
        "|---|---|---|---|---|---|---|",
    ]
    for (solver, allocation, method), runs in found.items():
        scores = by_seed(runs)
        shown = f"{statistics.mean(scores.values()):{digits}} ± {interval(list(scores.values())):{digits}}"
        difference = None
        if method != HEALING[0]:
            difference = paired(scores, by_seed(found.get((solver, allocation, HEALING[0]), [])))
        more = f"{difference.mean:+{digits}} ± {difference.interval:{digits}}" if difference else ""
        parameters, rate = runs[0]["adapter_parameters"], runs[0]["rate"]
        lines.append(f"| {solver} | {allocation} | {method} | {rate:g} | {parameters:,} | {shown} | {more} |")
    return "\n".join(lines)


def is_perplexity(own: Sequence[Line]) -> bool:
    return str(own[0]["metric"]).startswith("perplexity")


def by_seed(runs: Iterable[Line]) -> dict[int, float]:
    return {line["seed"]: line["test"] for line in runs}


def tuning_table(lines: Iterable[Line], used: Mapping[tuple[str, str], float]) -> str:
    """Means of the validation over the tuning seeds and both starting points, by rate."""
    means = tuned(lines)
    rates = sorted({rate for _, _, rate in means})
    shown = [
        f"| task | healed with | {' | '.join(f'{rate:g}' for rate in rates)} | used |",
        "|---" * (len(rates) + 3) + "|",
    ]
    for (task, method), chosen in used.items():
        values = " | ".join(f"{means[task, method, rate]:.3f}" for rate in rates)
        shown.append(f"| {task} | {method} | {values} | {chosen:g} |")
    return "\n".join(shown)


def tuned(lines: Iterable[Line]) -> dict[tuple[str, str, float], float]:
    """Mean of the validation by task, method and rate."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for line in lines:
        task = line["task"].partition("/")[2]
        found.setdefault((task, line["healed_with"], line["rate"]), []).append(line["validation"])
    return {name: statistics.mean(values) for name, values in found.items()}


def draw(lines: Iterable[Line]) -> Figure:
    """The metric against the parameters that are left, and what healing makes of it."""
    by_task = tasks(lines)
    figure = Figure(figsize=(7 * len(by_task), 5), layout="constrained")
    panels = figure.subplots(1, len(by_task), squeeze=False)[0]
    for panel, (task, own) in zip(panels, by_task.items(), strict=True):
        colours: dict[str, str] = {}
        for solver, allocation in dict.fromkeys((line["solver"], line["allocation"]) for line in own):
            points = sorted(
                (line["parameters"], line["test"])
                for line in own
                if (line["solver"], line["allocation"], line["healed_with"]) == (solver, allocation, "")
            )
            if solver == "dense":
                panel.axhline(points[0][1], color="grey", linestyle=":", label="dense")
            elif allocation in ("uniform", "greedy"):
                colour = colours.setdefault(solver, f"C{len(colours)}")
                style = "o-" if allocation == "greedy" else "o--"
                panel.plot(*zip(*points, strict=True), style, color=colour, label=f"{solver}, {allocation}")
        for line in own:
            if line["healed_with"] and line["seed"] == SEEDS[0]:
                runs = by_seed(run for run in own if run["method"] == line["method"])
                size, mean = line["parameters"] + line["adapter_parameters"], statistics.mean(runs.values())
                marker = "Ds^"[HEALING.index(line["healed_with"])]
                panel.errorbar(size, mean, interval(list(runs.values())), fmt=marker, color=colours[line["solver"]])
        for method, marker in zip(HEALING, "Ds^", strict=True):
            panel.plot([], [], marker, color="black", label=f"healed: {method}")
        if is_perplexity(own):
            panel.set_yscale("log")
        panel.set(xlabel="parameters of the model, adapters included", ylabel=own[0]["metric"], title=task)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure
