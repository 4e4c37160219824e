"""What `segment.py` shows of its runs: tables, and a picture of masks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from quality.cells import Cell
from quality.comparison import interval, paired

Results = Mapping[Cell, dict[str, Any]]
SEEDS, TUNING_SEEDS = range(5), range(100, 102)
"""Those that are reported, and those that learning rates were chosen on."""
BASELINE = "LoRA"


def table(results: Results) -> str:
    """Means over seeds in percent, with 95 % intervals, and differences to LoRA's at equal seeds."""
    by_method: dict[str, dict[int, float]] = {}
    for cell, result in results.items():
        by_method.setdefault(cell.method, {})[cell.seed] = 100 * result["test"]
    details = {cell.method: (f"{result['parameters']:,}", cell.rate) for cell, result in results.items()}
    lines = ["| method | trained in the encoder | rate | mean IoU, % | more than LoRA's |", "|---|---|---|---|---|"]
    for method, scores in by_method.items():
        parameters, rate = details[method]
        shown = f"{statistics.mean(scores.values()):.1f}"
        if len(scores) > 1:
            shown += f" ± {interval(list(scores.values())):.1f}"
        difference = paired(scores, by_method.get(BASELINE, {})) if method != BASELINE else None
        more = f"{difference.mean:+.1f} ± {difference.interval:.1f}" if difference else ""
        lines.append(f"| {method} | {parameters} | {f'{rate:g}' if rate else ''} | {shown} | {more} |")
    return "\n".join(lines)


def tuning_table(results: Results, used: Mapping[str, float]) -> str:
    """Means of the validation's mean IoU over the tuning seeds, in percent, by rate."""
    rates = sorted({cell.rate for cell in results if cell.rate})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} | used |", "|---" * (len(rates) + 2) + "|"]
    for method, chosen in used.items():
        means = []
        for rate in rates:
            found = [r["validation"] for cell, r in results.items() if (cell.method, cell.rate) == (method, rate)]
            means.append(f"{100 * statistics.mean(found):.1f}" if found else "")
        lines.append(f"| {method} | {' | '.join(means)} | {chosen:g} |")
    return "\n".join(lines)


def draw_masks(scenes: np.ndarray, columns: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Figure:
    """Scenes (N, H, W) from -1 to 1, and beside it masks (N, H, W) of each column, without the class 0."""
    figure = Figure(figsize=(1.4 * (1 + len(columns)) + 0.6, 1.4 * len(scenes) + 0.4), layout="constrained")
    panels = figure.subplots(len(scenes), 1 + len(columns), squeeze=False)
    colours = ListedColormap(colormaps["Paired"].colors[: len(names) - 1])
    for line, scene, *masks in zip(panels, scenes, *columns.values(), strict=True):
        for panel, mask in zip(line, [None, *masks], strict=True):
            panel.imshow(scene, cmap="gray", vmin=-1, vmax=1)
            if mask is not None:
                covered = np.ma.masked_equal(mask, 0)
                shown = panel.imshow(covered, cmap=colours, vmin=0.5, vmax=len(names) - 0.5, interpolation="none")
            panel.set(xticks=[], yticks=[])
    for panel, title in zip(panels[0], ["scene", *columns], strict=True):
        panel.set_title(title, fontsize=8)
    bar = figure.colorbar(shown, ax=panels, ticks=range(1, len(names)), shrink=0.8)
    bar.ax.set_yticklabels(names[1:], fontsize=7)
    return figure
