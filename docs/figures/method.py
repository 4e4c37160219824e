"""Draws the method as method.png, from numbers that it computes: `python docs/figures/method.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pywt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PICTURE = Path(__file__).with_suffix(".png")
ROWS, COLUMNS, RANK = 16, 24, 2
COLOURS = {"aa1": "#1f5fa8", "ad1": "#d9822b", "da1": "#2f8f5b", "dd1": "#a63d6f"}
"""Of the subbands: the first letter is the rows' filter, the second the columns'; a is the mean, d the difference."""
NEGATIVE = "#3a3a3a"
TEXT = {"color": "#1a1a1a", "ha": "center", "va": "center"}


@dataclass(frozen=True)
class Pair:
    """Factors of one subband, and what the inverse transform makes of them: columns of B, rows of A."""

    coefficients_b: np.ndarray
    coefficients_a: np.ndarray
    b: np.ndarray
    a: np.ndarray


def inverse(coefficients: np.ndarray, band: str, axis: int) -> np.ndarray:
    """One level of Haar's inverse transform on one axis, where the other band is zero."""
    other = np.zeros_like(coefficients)
    both = (coefficients, other) if band == "a" else (other, coefficients)
    return np.asarray(pywt.idwt(*both, "haar", axis=axis))


def pairs() -> dict[str, Pair]:
    """A pair for each subband, drawn once."""
    random = np.random.default_rng(7)
    found = {}
    for name in COLOURS:
        b = random.uniform(-1, 1, (ROWS // 2, RANK))
        a = random.uniform(-1, 1, (RANK, COLUMNS // 2))
        found[name] = Pair(b, a, inverse(b, name[0], 0), inverse(a, name[1], 1))
    return found


def draw(axes: Axes, values: np.ndarray, left: float, top: float, colour: str) -> None:
    """A matrix as cells of size 1, framed; positive numbers in the colour, negative ones in grey."""
    rows, columns = values.shape
    shades = LinearSegmentedColormap.from_list(colour, [NEGATIVE, "white", colour])
    limit = np.abs(values).max()
    box = (left, left + columns, top - rows, top)
    axes.imshow(values, cmap=shades, vmin=-limit, vmax=limit, extent=box, interpolation="nearest", zorder=2)
    axes.add_patch(Rectangle((left, top - rows), columns, rows, fill=False, edgecolor=colour, linewidth=1.6, zorder=3))


def arrow(axes: Axes, left: float, right: float, height: float) -> None:
    style = {"arrowstyle": "-|>", "color": "#1a1a1a", "linewidth": 2, "mutation_scale": 18}
    axes.annotate("", (right, height), (left, height), arrowprops=style)


def figure() -> Figure:
    drawn = Figure(figsize=(12, 4.3), facecolor="white")
    axes = drawn.add_axes((0, 0, 1, 1))
    found = pairs()

    # The quadrants of the decomposed update, each with its pair: B_s left of it, A_s above.
    width, height = COLUMNS // 2, ROWS // 2
    for index, (name, pair) in enumerate(found.items()):
        row, column = divmod(index, 2)
        left, top = column * (width + RANK + 3), -row * (height + RANK + 3)
        axes.add_patch(
            Rectangle((left + RANK + 0.6, top - RANK - 0.6 - height), width, height, color=COLOURS[name], alpha=0.13)
        )
        axes.text(
            left + RANK + 0.6 + width / 2, top - RANK - 0.6 - height / 2, f"{name}\n$B_s A_s$", fontsize=12, **TEXT
        )
        draw(axes, pair.coefficients_b, left, top - RANK - 0.6, COLOURS[name])
        draw(axes, pair.coefficients_a, left + RANK + 0.6, top, COLOURS[name])
    middle = -(2 * (height + RANK) + 3.6) / 2
    arrow(axes, 33.2, 41.2, middle)
    axes.text(37.2, middle + 3.6, "inverse\ntransform of\nthe factors", fontsize=11, **TEXT)

    # The factors of a LoRA, pair by pair.
    left, top = 43.0, middle + ROWS / 2
    for index, (name, pair) in enumerate(found.items()):
        draw(axes, pair.b, left + index * RANK, top, COLOURS[name])
        draw(axes, pair.a, left + 4 * RANK + 2.2, middle + 2 * RANK - index * RANK, COLOURS[name])
    axes.text(left + 4 * RANK + 1.1, middle, "·", fontsize=22, **TEXT)
    equal = left + 4 * RANK + 2.2 + COLUMNS + 2
    axes.text(equal, middle, "=", fontsize=22, **TEXT)
    update = sum(pair.b @ pair.a for pair in found.values())
    draw(axes, np.asarray(update), equal + 2, top, "#6a51a3")

    for x, title, below in (
        (15.5, "trained: a pair for each subband", "four pairs of rank r: 2r(m + n) parameters"),
        (left + 17, "together: a LoRA of rank R = 4r", "merged, exported and served as LoRA"),
        (equal + 2 + COLUMNS / 2, "ΔW, the change of a weight", "m × n; no transform ever sees it"),
    ):
        axes.text(x, 3.4, title, fontsize=13, fontweight="bold", **TEXT)
        axes.text(x, 2 * middle - 3.2, below, fontsize=11, **TEXT)
    axes.text(left + 4, top + 1.3, "B", fontsize=12, **TEXT)
    axes.text(left + 4 * RANK + 2.2 + COLUMNS / 2, middle + 2 * RANK + 1.3, "A", fontsize=12, **TEXT)
    axes.set(xlim=(-2.5, equal + 2 + COLUMNS + 2), ylim=(2 * middle - 5, 5), aspect="equal")
    axes.set_axis_off()
    return drawn


if __name__ == "__main__":
    figure().savefig(PICTURE, dpi=150, metadata={"Software": None})
