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
        shown = [bytes_table(own)] if "stored" in own[0] else [compressing_table(own), healing_table(own)]
        parts += [f"**{task}**, {own[0]['metric']}", *shown]
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


def bytes_table(own: Sequence[Line]) -> str:
    """A row for each way to compress and heal; columns of the bytes of the layers and the perplexity at them."""
    lines = [
        "| kept | solver | ranks | healed with | seeds | 16 bits | perplexity | nf4 | perplexity |",
        "|---" * 9 + "|",
    ]
    runs: dict[tuple[float, str, str, str], list[Line]] = {}
    for line in own:
        runs.setdefault((line["budget"], line["solver"], line["allocation"], line["healed_with"]), []).append(line)
    for (budget, solver, allocation, method), same in sorted(runs.items(), key=lambda item: -item[0][0]):
        cells = []
        for storage in ("16 bits", "nf4, double"):
            stored = [line["stored"][storage] for line in same]
            perplexity = statistics.mean(found["perplexity"] for found in stored)
            cells += [f"{stored[0]['bytes'] / 1e6:.1f} MB", f"{perplexity:,.{1 if perplexity < 1000 else 0}f}"]
        seeds = len(same) if method else ""
        lines.append(f"| {budget:.0%} | {solver} | {allocation} | {method} | {seeds} | {' | '.join(cells)} |")
    (dense,) = (line for line in own if line["solver"] == "dense")
    lines += ["", "| dense layers stored as | bytes | perplexity |", "|---|---|---|"]
    lines += [
        f"| {storage} | {found['bytes'] / 1e6:.1f} MB | {found['perplexity']:.1f} |"
        for storage, found in dense["stored"].items()
    ]
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
        found = [means.get((task, method, rate)) for rate in rates]
        values = " | ".join("" if value is None else f"{value:.3f}" for value in found)
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


def draw_bytes(own: Sequence[Line]) -> Figure:
    """The perplexity against the bytes of the layers, as floats and as nf4."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    panel = figure.subplots()
    (dense,) = (line for line in own if line["solver"] == "dense")
    for storage, found in dense["stored"].items():
        point = found["bytes"] / 1e6, found["perplexity"]
        panel.plot(*point, "k*", markersize=9)
        panel.annotate(f"  dense, {storage}", point, rotation=60, fontsize=7)
    markers = dict(zip(("", *HEALING), ".Ds^", strict=True))
    colours: dict[str, str] = {}
    ways = dict.fromkeys(
        (line["solver"], line["allocation"], line["healed_with"]) for line in own if line is not dense
    )
    for way in ways:
        solver, allocation, method = way
        colour = colours.setdefault(solver, f"C{len(colours)}")
        runs = [line for line in own if (line["solver"], line["allocation"], line["healed_with"]) == way]
        runs = sorted((line for line in runs if line["seed"] == SEEDS[0]), key=lambda line: line["budget"])
        for storage, style in (("16 bits", "-"), ("nf4, double", "--")):
            points = [line["stored"][storage] for line in runs]
            sizes, scores = [p["bytes"] / 1e6 for p in points], [p["perplexity"] for p in points]
            label = ", ".join(part for part in (solver, allocation, method and f"healed: {method}", storage) if part)
            shade = 1 if allocation == "greedy" else 0.4
            panel.plot(sizes, scores, markers[method] + style, color=colour, alpha=shade, label=label)
    panel.set(xlabel="bytes of the layers, MB", ylabel=dense["metric"], xscale="log", yscale="log")
    panel.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=6)
    return figure
