"""The picture of the results draws the numbers of the README's table."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "figures" / "results.py"
drawing = runpy.run_path(str(SCRIPT))
Interval, figure, intervals = drawing["Interval"], drawing["figure"], drawing["intervals"]
FAMILIES = drawing["summary"].FAMILIES


def of_the_readme() -> list[list[object]]:
    """Family, budget, form, text and verdict of each difference of a form of WaRA in the README's table."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- results: begin -->")[2]
    header, _, *lines = table.partition("<!-- results: end -->")[0].strip().splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    family, found = "", []
    for line in lines:
        cells = dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        family = next((name for name, words in FAMILIES.items() if words == cells["task"]), family)
        for form in ("subband", "grid"):
            text = cells[f"`{form}`"]
            if text:
                verdict = "no significant difference"
                if text.startswith("**"):
                    lower = "lower is better" in FAMILIES[family]
                    verdict = "worse" if text.startswith("**+") == lower else "better"
                budget = float(cells["parameters of"].removeprefix("LoRA r="))
                found.append([family, budget, form, text.strip("*"), verdict])
    return found


def test_the_kept_picture_is_of_the_readmes_table() -> None:
    with Image.open(SCRIPT.with_suffix(".png")) as kept:
        drawn = json.loads(kept.text["Description"])
    assert drawn == of_the_readme(), "run python docs/figures/results.py"
    assert {verdict for *_, verdict in drawn} == {"better", "worse", "no significant difference"}


def test_the_kept_picture_is_opaque_and_of_its_shape() -> None:
    shown = [
        Interval(family, budget, form, 1.0, 1.0, text, verdict)
        for family, budget, form, text, verdict in of_the_readme()
    ]
    with Image.open(SCRIPT.with_suffix(".png")) as kept:
        pixels = np.asarray(kept)
    width, height = figure(shown).get_size_inches()
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(width / height, rel=0.002)
    assert pixels.shape[2] == 3 or pixels[..., 3].min() == 255
    assert (pixels[[0, -1], :, :3] == 255).all() and (pixels[:, [0, -1], :3] == 255).all()


def test_intervals_lie_at_their_numbers_and_better_is_to_the_right() -> None:
    """A point and a bar for each, in the colour of its verdict, from top to bottom."""
    shown = [
        Interval("digits", 1.0, "subband", 5.0, 2.0, "+5.0 ± 2.0", "better"),
        Interval("digits", 1.0, "grid", -3.0, 4.0, "-3.0 ± 4.0", "no significant difference"),
        Interval("conv", 4.0, "subband", -9.0, 1.0, "-9.0 ± 1.0", "worse"),
        Interval("planted", 4.0, "subband", 0.5, 0.25, "+0.500 ± 0.250", "worse"),
    ]
    points, panels = figure(shown), []
    for axes in points.axes:
        bars = [(line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor()) for line, *_ in axes.containers]
        ends = [container.lines[2][0].get_segments()[0][:, 0].tolist() for container in axes.containers]
        words = [text.get_text() for text in axes.texts]
        panels.append((axes, bars, ends, words))
        low, high = axes.get_xlim()
        assert all(min(low, high) < end < max(low, high) for pair in ends for end in pair)
        assert (0 - low) / (high - low) == pytest.approx(0.3)  # LoRA lies at one place in all panels
    (accuracy, bars, ends, words), (error, error_bars, error_ends, _) = panels
    assert [x for x, _, _ in bars] == [5.0, -3.0, -9.0] and [x for x, _, _ in error_bars] == [0.5]
    assert ends == [[3.0, 7.0], [-7.0, 1.0], [-10.0, -8.0]] and error_ends == [[0.25, 0.75]]
    heights = [y for _, y, _ in bars]
    assert heights == sorted(heights, reverse=True)
    colours = drawing["COLOURS"]
    assert [to_rgba(colour) for *_, colour in bars] == [
        to_rgba(colour) for colour in (colours["better"], "white", colours["worse"])
    ]
    assert accuracy.get_xlim()[0] < accuracy.get_xlim()[1] and error.get_xlim()[0] > error.get_xlim()[1]
    assert {"+5.0 ± 2.0", "−3.0 ± 4.0", "−9.0 ± 1.0", "digits with a convolutional network", "LoRA r=4"} <= {*words}


@pytest.mark.slow
def test_the_drawn_numbers_are_those_that_their_texts_say() -> None:
    """Means and halves of intervals, which the picture is drawn from, beside the texts, which the table shows."""
    shown = list(intervals(drawing["summary"].summary()))
    assert drawing["table"](shown) == of_the_readme()
    for one in shown:
        mean, half = map(float, one.text.split(" ± "))
        decimals = len(re.sub(r".*\.", "", one.text))
        assert (one.mean, one.half) == pytest.approx((mean, half), abs=0.51 * 10**-decimals)


def test_what_the_readme_says_beside_the_picture_names_its_significant_rows() -> None:
    """Alt text, and when not to use WaRA: both are written by hand, and want a look when this fails."""
    significant = {(family, budget, form): verdict for family, budget, form, _, verdict in of_the_readme()}
    significant = {row: verdict for row, verdict in significant.items() if verdict != "no significant difference"}
    better = {("digits-long", budget, form) for budget, form in ((1, "subband"), (16, "subband"))}
    better |= {
        ("digits-long", 1, "grid"),
        ("digits-long", 4, "grid"),
        ("digits-long", 16, "grid"),
        ("digits", 4, "grid"),
    }
    assert significant == dict.fromkeys(better, "better") | {("planted", 4, "subband"): "worse"}
