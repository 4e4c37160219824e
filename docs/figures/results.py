"""Draws the results as results.png, from the cells of benchmarks/quality: `python docs/figures/results.py`.

The numbers are those of the README's table: differences to LoRA with as many parameters, paired by seed, with 95 %
intervals. Accuracies are in points; perplexities, losses and errors in per cent of LoRA's, and turned round, so that
better is to the right everywhere. The words follow Holm's p, as the table's bold figures do.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from quality.methods import DEFAULT
from quality.reported import mean
from quality.tasks import TASKS
from summary import Row, significant, summary

PICTURE = Path(__file__).with_suffix(".png")
METHODS = {DEFAULT: ("`subband`", "o"), "WaRA grid": ("`grid`", "s"), "rsLoRA": ("rsLoRA", "x")}
"""Each method's name and marker, in the order from the top."""
COLOURS = {"better": "#1f5fa8", "not told apart": "#8a8a8a", "worse": "#c4531b"}
SHORT = {
    "digits-long": "digits, ViT, 300 steps",
    "digits": "digits, ViT, 80 or 100 steps",
    "conv": "digits, convolutions",
    "docstrings": "texts, MiniLM",
    "language": "texts, small Llama",
    "planted": "planted change",
    "translation": "translation, SmolLM2-135M",
}
SPREAD = 0.24
"""Distance of the methods' marks within a row."""


@dataclass(frozen=True)
class Mark:
    """An interval as it is drawn; better than LoRA is to the right of 0."""

    method: str
    centre: float
    interval: float
    verdict: str

    def __str__(self) -> str:
        return f"{self.method} {self.centre:+.2f} ± {self.interval:.2f}, {self.verdict}"


def accuracy(row: Row) -> bool:
    return next(task for name, task in TASKS.items() if name.startswith(f"{row.family}/")).metric == "accuracy"


def marks(row: Row) -> list[Mark]:
    """In points of accuracy, or in per cent of LoRA's figure."""
    higher_is_better = accuracy(row)
    factor = 100.0 if higher_is_better else -100.0 / mean(row.lora.row.tests)
    found = []
    for method, item in row.others.items():
        if method in METHODS and item.difference is not None:
            centre = factor * item.difference.mean
            verdict = "not told apart" if not significant(item) else "better" if centre > 0 else "worse"
            found.append(Mark(method, centre, abs(factor) * item.difference.interval, verdict))
    return found


def draw(axes: Axes, rows: list[Row], unit: str) -> None:
    places = list(METHODS)
    for height, row in enumerate(rows):
        for mark in marks(row):
            y = height + (places.index(mark.method) - 1) * SPREAD
            colour, marker = COLOURS[mark.verdict], METHODS[mark.method][1]
            axes.errorbar(mark.centre, y, xerr=mark.interval, color=colour, fmt=marker, markersize=5, linewidth=1.6)
        if height % 2:
            axes.axhspan(height - 0.5, height + 0.5, color="#f3f3f3", zorder=0)
    axes.axvline(0, color="#1a1a1a", linewidth=1)
    labels = [f"{SHORT[row.family]}, r={row.budget:g}" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(unit)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def figure() -> Figure:
    rows = summary()
    drawn = Figure(figsize=(12, 4.4), facecolor="white", layout="constrained")
    left, right = drawn.subplots(1, 2)
    draw(left, [row for row in rows if accuracy(row)], "points of accuracy; right of 0 is better than LoRA")
    draw(right, [row for row in rows if not accuracy(row)], "per cent of LoRA's perplexity, loss or error saved")
    handles = [
        Line2D([], [], color="#1a1a1a", marker=marker, linestyle="", label=name.strip("`"))
        for name, marker in METHODS.values()
    ]
    handles += [Line2D([], [], color=colour, linewidth=3, label=verdict) for verdict, colour in COLOURS.items()]
    drawn.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return drawn


def description() -> str:
    """What is drawn, as the text that the picture carries; a test compares it with the results."""
    return "\n".join(f"{row.family} r={row.budget:g}: {mark}" for row in summary() for mark in marks(row))


if __name__ == "__main__":
    figure().savefig(PICTURE, dpi=150, metadata={"Software": None, "Description": description()})
