"""What `train_diffusion.py` shows of its runs: tables, and a picture of samples."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

# The statistics and the store of finished runs are those of the benchmarks.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality.cells import Cell
from quality.comparison import interval, paired

Results = Mapping[Cell, dict[str, Any]]
SEEDS, TUNING_SEEDS = range(5), range(100, 102)
"""Those that are reported, and those that learning rates were chosen on."""
BASELINE = "LoRA"


def tuning_table(results: Results, used: Mapping[str, float]) -> str:
    """Mean distance to the pool's images over the tuning seeds, by rate."""
    rates = sorted({cell.rate for cell in results})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} | used |", "|---" * (len(rates) + 2) + "|"]
    for method, chosen in used.items():
        found = [
            [result["validation"] for cell, result in results.items() if (cell.method, cell.rate) == (method, rate)]
            for rate in rates
        ]
        means = " | ".join(f"{statistics.mean(values):.2f}" for values in found)
        lines.append(f"| {method} | {means} | {chosen:g} |")
    return "\n".join(lines)


def table(results: Results) -> str:
    """Means over seeds with 95 % intervals, and differences to LoRA at equal seeds."""

    def scores(method: str, name: str, factor: float) -> dict[int, float]:
        return {cell.seed: factor * result[name] for cell, result in results.items() if cell.method == method}

    lines = [
        "| method | adapter parameters | rate | Fréchet distance | minus LoRA's | accuracy, % | minus LoRA's |",
        "|---|---|---|---|---|---|---|",
    ]
    details = {cell.method: (result["parameters"], cell.rate) for cell, result in results.items()}
    for method, (parameters, rate) in details.items():
        row = [method, f"{parameters:,}", f"{rate:g}"]
        for name, factor, shown in (("test", 1.0, ".2f"), ("accuracy", 100.0, ".1f")):
            own = scores(method, name, factor)
            half = f" ± {interval(list(own.values())):{shown}}" if len(own) > 1 else ""
            row.append(f"{statistics.mean(own.values()):{shown}}{half}")
            difference = paired(own, scores(BASELINE, name, factor)) if method != BASELINE else None
            row.append(f"{difference.mean:+{shown}} ± {difference.interval:{shown}}" if difference else "")
        lines.append(f"| {' | '.join(row)} |")
    learned = {cell.seed: result["test_of_learned_images"] for cell, result in results.items()}
    half = f" ± {interval(list(learned.values())):.2f}" if len(learned) > 1 else ""
    lines.append(f"| the images learned from, themselves | | | {statistics.mean(learned.values()):.2f}{half} | | | |")
    real = next(iter(results.values()))["test_of_real_images"]
    return "\n".join([*lines, f"| all images of the pool | | | {real:.2f} | | | |"])


def draw_samples(rows: Mapping[str, Sequence[Tensor]], classes: Sequence[str], of_each: int = 5) -> Figure:
    """The first pixels (1, H, W) between -1 and 1 of each class, for each row side by side."""
    columns = of_each * len(classes)
    figure = Figure(figsize=(0.6 * columns + 1.5, 0.65 * len(rows) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, by_class) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for start, pixels in enumerate(by_class):
            for panel, image in zip(line[start * of_each :], pixels[:of_each], strict=False):
                panel.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
    for column, panel in enumerate(panels[0]):
        panel.set_title(classes[column // of_each])
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    return figure
