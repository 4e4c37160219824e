"""What train_low_rank.py shows of its runs: tables and a picture."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# The statistics and the store of finished runs are those of the benchmarks.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality.cells import Cell
from quality.comparison import interval, paired

Results = Mapping[Cell, dict[str, Any]]
SEEDS, TUNING_SEEDS = range(3), range(100, 102)
"""Those that are reported, and those that learning rates were chosen on."""
BASELINES = ("low-rank", "dense")


def by_task(results: Results) -> dict[str, dict[str, list[tuple[Cell, dict[str, Any]]]]]:
    """Runs by the names of task and method, in the order in which they come."""
    found: dict[str, dict[str, list[tuple[Cell, dict[str, Any]]]]] = {}
    for cell, result in results.items():
        name = cell.task.partition("/")[2]
        found.setdefault(name, {}).setdefault(cell.method, []).append((cell, result))
    return found


def table(results: Results) -> str:
    """Of each task means over seeds with 95 % intervals, differences at equal seeds, and costs."""
    return "\n\n".join("\n".join(rows(task, methods)) for task, methods in by_task(results).items())


def rows(task: str, methods: Mapping[str, Sequence[tuple[Cell, dict[str, Any]]]]) -> list[str]:
    scores = {name: {cell.seed: result["test"] for cell, result in runs} for name, runs in methods.items()}
    metric = next(iter(methods.values()))[0][1]["metric"]
    lines = [
        f"| {task} | parameters | rate | {metric} | {' | '.join(f'minus {name}' for name in BASELINES)} "
        "| MB in training | step | inference |",
        "|---" * 9 + "|",
    ]
    for name, runs in methods.items():
        differences = [paired(scores[name], scores.get(other, {})) if name != other else None for other in BASELINES]
        found = [result for _, result in runs]
        changes = any(result["memory"]["first"] != result["memory"]["last"] for result in found)
        row = [
            name,
            span([result["parameters"] for result in found]),
            f"{runs[0][0].rate:g}",
            mean(list(scores[name].values())),
            *(f"{value.mean:+.2f} ± {value.interval:.2f}" if value else "" for value in differences),
            at_first_and_at_last([result["memory"] for result in found], changes, 1e-6),
            at_first_and_at_last([result["time"] for result in found], changes),
            f"{statistics.mean(result['time']['inference'] for result in found):.2f}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def mean(values: Sequence[float]) -> str:
    half = f" ± {interval(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{half}"


def span(counts: Sequence[int]) -> str:
    """One number, or the least and the most."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def at_first_and_at_last(found: Sequence[Mapping[str, float]], both: bool, factor: float = 1.0) -> str:
    first, last = (f"{factor * statistics.mean(values[when] for values in found):.2f}" for when in ("first", "last"))
    return f"{first}, {last} at last" if both else first


def tuning_table(results: Results, used: Mapping[str, Mapping[str, float]]) -> str:
    """Of each task means of the metric on validation data over the tuning seeds, by rate."""
    rates = sorted({cell.rate for cell in results})
    lines = []
    for task, methods in by_task(results).items():
        lines += [f"| {task} | {' | '.join(f'{rate:g}' for rate in rates)} | used |", "|---" * (len(rates) + 2) + "|"]
        for name, runs in methods.items():
            means = []
            for rate in rates:
                values = [result["validation"] for cell, result in runs if cell.rate == rate]
                means.append(f"{statistics.mean(values):.2f}" if values else "")
            lines.append(f"| {name} | {' | '.join(means)} | {used[task][name]:g} |")
        lines.append("")
    return "\n".join(lines[:-1])


def draw(results: Results) -> Figure:
    """The metric of each run against the bytes that its training takes."""
    tasks = by_task(results)
    figure = Figure(figsize=(6 * len(tasks), 5), layout="constrained")
    for axes, (task, methods) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        for number, (name, runs) in enumerate(methods.items()):
            found = [result for _, result in runs]
            memory = [statistics.mean(result["memory"][when] / 1e6 for result in found) for when in ("first", "last")]
            score = statistics.mean(result["test"] for result in found)
            axes.plot(memory, [score, score], "-", color=f"C{number}", linewidth=1)
            half = interval([result["test"] for result in found]) if len(found) > 1 else 0.0
            parameters = statistics.mean(result["parameters"] for result in found)
            axes.errorbar(memory[0], score, half, fmt="o", color=f"C{number}", label=f"{name}, {parameters:,.0f}")
        axes.set(xlabel="MB in training, at first and at last", ylabel=found[0]["metric"], title=task)
        axes.grid(alpha=0.3)
        axes.legend(title="method, parameters", fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    return figure
