"""Draws how far WaRA is from LoRA on each family of tasks as results.png: `python docs/figures/results.py`.

The numbers are those of the README's table of results.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import summary
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality.report import SIGNIFICANT, unit
from quality.tasks import TASKS, Task

PICTURE = Path(__file__).with_suffix(".png")
DRAWN = "Description"
"""Where the picture's metadata say what is drawn in it."""
FORMS = {method: name.strip("`") for method, name in summary.OTHERS.items() if method.startswith("WaRA ")}
NOT_SIGNIFICANT = "no significant difference"
COLOURS = {"better": "#1f5fa8", NOT_SIGNIFICANT: "#6e6e6e", "worse": "#d9622b"}
TEXT = {"color": "#1a1a1a", "va": "center"}

WIDTH, AXIS_LEFT, AXIS_RIGHT = 12.0, 5.3, 10.4
LINE, GAP, TICKS, TOP = 0.29, 0.16, 0.62, 1.3
"""Heights of an interval's line, of the gap between two tasks, of an axis' numbers and name, and of the head."""
ZERO = 0.3
"""How far right on each axis LoRA lies, as a share of its length."""


@dataclass(frozen=True)
class Interval:
    """A form's difference to LoRA on a family of tasks, with its text and verdict as in the README's table."""

    family: str
    budget: float
    form: str
    mean: float
    half: float
    text: str
    verdict: str


def task_of(family: str) -> Task:
    """The first task of a family; all of them have one metric."""
    return next(task for name, task in TASKS.items() if name.startswith(f"{family}/"))


def axis_name(family: str) -> str:
    """What an axis measures; neighbouring families with the same name share one."""
    task = task_of(family)
    name = "accuracy, points" if task.metric == "accuracy" else task.metric
    return name if task.higher_is_better else f"{name} (lower is better)"


def intervals(rows: Iterable[summary.Row]) -> Iterator[Interval]:
    for row in rows:
        factor, _ = unit(row.family)
        for method, form in FORMS.items():
            item = row.others.get(method)
            if item is None or item.difference is None:
                continue
            mean, half = factor * item.difference.mean, factor * item.difference.interval
            verdict = NOT_SIGNIFICANT
            if summary.significant(item):
                verdict = "better" if (mean > 0) == task_of(row.family).higher_is_better else "worse"
            text = summary.difference_text(item, row.family)
            yield Interval(row.family, row.budget, form, mean, half, text, verdict)


def draw_panel(axes: Axes, shown: list[Interval]) -> None:
    """The intervals from top to bottom; better lies to the right of LoRA on every axis."""
    sign = 1 if task_of(shown[0].family).higher_is_better else -1
    right = max(sign * one.mean + one.half for one in shown)
    left = max(one.half - sign * one.mean for one in shown)
    length = 1.05 * max(right / (1 - ZERO), left / ZERO)
    axes.set_xlim(-sign * ZERO * length, sign * (1 - ZERO) * length)
    axes.axvline(0, color="#1a1a1a", linewidth=1, zorder=1)

    height, above, labelled = 0.0, "", ("", 0.0)
    for one in shown:
        height -= GAP if above not in ("", one.family) else 0
        y = height - LINE / 2
        colour = COLOURS[one.verdict]
        fill = "white" if one.verdict == NOT_SIGNIFICANT else colour
        style = {"color": colour, "markerfacecolor": fill, "markersize": 7, "capsize": 3, "linewidth": 2}
        axes.errorbar(one.mean, y, xerr=one.half, fmt="o", zorder=2, **style)
        labels = [(AXIS_RIGHT + 0.15, one.text.replace("-", "−"), colour), (AXIS_LEFT - 0.85, one.form, TEXT["color"])]
        if one.family != above:
            labels.append((0.25, summary.FAMILIES[one.family].partition(":")[0], TEXT["color"]))
        if (one.family, one.budget) != labelled:
            labels.append((AXIS_LEFT - 2.1, f"LoRA r={one.budget:g}", TEXT["color"]))
        for inches, text, shade in labels:
            place = (inches - AXIS_LEFT) / (AXIS_RIGHT - AXIS_LEFT)
            axes.text(place, y, text, transform=axes.get_yaxis_transform(), fontsize=11, va="center", color=shade)
        height, above, labelled = height - LINE, one.family, (one.family, one.budget)
    axes.set_ylim(height, 0)
    axes.set_xlabel(axis_name(shown[0].family), fontsize=10, labelpad=1)
    axes.tick_params(labelsize=9)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)


def panel_height(shown: list[Interval]) -> float:
    return LINE * len(shown) + GAP * (len({one.family for one in shown}) - 1)


def figure(shown: list[Interval]) -> Figure:
    """A panel for each measure that tasks have, below a head that says what the colours mean."""
    panels = [list(of_axis) for _, of_axis in groupby(shown, lambda one: axis_name(one.family))]
    total = TOP + sum(panel_height(panel) + TICKS for panel in panels)
    drawn = Figure(figsize=(WIDTH, total), facecolor="white")
    top = total - TOP
    for panel in panels:
        top -= panel_height(panel)
        width, height = (AXIS_RIGHT - AXIS_LEFT) / WIDTH, panel_height(panel) / total
        draw_panel(drawn.add_axes((AXIS_LEFT / WIDTH, top / total, width, height)), panel)
        top -= TICKS
    zero = AXIS_LEFT + ZERO * (AXIS_RIGHT - AXIS_LEFT)
    title = "WaRA's difference to LoRA with as many parameters, with 95 % intervals"
    drawn.text(0.25 / WIDTH, 1 - 0.28 / total, title, fontsize=13, fontweight="bold", **TEXT)
    for inches, verdict in zip((0.25, 1.2, 3.7), COLOURS, strict=True):
        words = {"fontsize": 11, "va": "center", "color": COLOURS[verdict]}
        mark = "○" if verdict == NOT_SIGNIFICANT else "●"
        drawn.text(inches / WIDTH, 1 - 0.62 / total, f"{mark} {verdict}", **words)
    drawn.text(4.75 / WIDTH, 1 - 0.62 / total, f"(significant: Holm's p < {SIGNIFICANT:g})", fontsize=11, **TEXT)
    for inches, text, place in (
        (0.25, "task", "left"),
        (AXIS_LEFT - 2.1, "parameters of", "left"),
        (AXIS_LEFT - 0.85, "form", "left"),
        (zero - 0.35, "← worse", "right"),
        (zero, "LoRA", "center"),
        (zero + 0.35, "better →", "left"),
    ):
        drawn.text(inches / WIDTH, 1 - 1.08 / total, text, fontsize=11, fontstyle="italic", ha=place, **TEXT)
    return drawn


def table(shown: Iterable[Interval]) -> list[list[object]]:
    """What the picture's metadata keep: family, budget, form, text and verdict."""
    return [[one.family, one.budget, one.form, one.text, one.verdict] for one in shown]


if __name__ == "__main__":
    found = list(intervals(summary.summary()))
    figure(found).savefig(PICTURE, dpi=150, metadata={"Software": None, DRAWN: json.dumps(table(found))})
