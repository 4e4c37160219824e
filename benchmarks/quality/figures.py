"""Pareto pictures: a task's metric against trained parameters, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib import colormaps
from matplotlib.figure import Figure

from quality.comparison import interval
from quality.reported import Reported, mean
from quality.tasks.task import Task

DODGE = 1.05
"""Methods of equal size are drawn side by side, each this factor of parameters right of the one before."""
MARKERS = {"WaRA": "o", "peer": "s", "later": "P", "ranks": "v", "attention": "^", "end": "D"}


def pareto(tasks: list[Task], found: Mapping[str, list[Reported]], groups: Mapping[str, str]) -> Figure:
    """A panel a task; WaRA with circles and full lines, peers with squares and dashes, ranks with triangles down.

    Args:
        tasks: of one family.
        found: what is reported, by task.
        groups: of the methods, by name.
    """
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    names = [name for name in groups if any(row.method == name for task in tasks for row in found[task.name])]
    colours = {name: colormaps["tab20"](2 * index % 19) for index, name in enumerate(names)}
    dodge = {name: DODGE ** (index - len(names) / 2) for index, name in enumerate(names)}
    handles: dict[str, object] = {}
    for panel, task in zip(panels.flat, tasks, strict=False):
        for name in names:
            points = sorted((row for row in found[task.name] if row.method == name), key=lambda row: row.parameters)
            values = [mean(row.tests) for row in points]
            if not points:
                continue
            if not points[0].parameters:
                handles[name] = panel.axhline(values[0], color=colours[name], linestyle=":", linewidth=1)
                continue
            handles[name] = panel.errorbar(
                [row.parameters * dodge[name] for row in points],
                values,
                [interval(list(row.tests.values())) for row in points],
                color=colours[name],
                marker=MARKERS[groups[name]],
                linestyle="-" if groups[name] == "WaRA" or name == "LoRA" else "--",
                linewidth=2 if name == "LoRA" else 1,
                markersize=4,
                capsize=2,
            )
        panel.set_xscale("log")
        panel.set_title(task.name, size=9)
        panel.set_xlabel("trained parameters, without the head", size=8)
        better = "higher" if task.higher_is_better else "lower"
        panel.set_ylabel(f"{task.metric} ({better} is better)", size=8)
        panel.tick_params(labelsize=7)
    for panel in list(panels.flat)[len(tasks) :]:
        panel.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), fontsize=8)
    return figure
