"""The picture of the results draws what the README's table says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "figures" / "results.py"
drawing = runpy.run_path(str(SCRIPT))
FACTORS = {"accuracy, %": 1.0, "lower is better": -100.0}


def table() -> dict[tuple[str, float], dict[str, tuple[float, float, float, bool]]]:
    """The README's table: by task and rank, each method's difference in the picture's unit, its interval, by how much
    both are rounded, and whether it is bold."""
    text = re.search(r"<!-- results: begin -->\n(.+?)\n<!-- results: end -->", (ROOT / "README.md").read_text(), re.S)
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text[1].splitlines())
    found, task, factor = {}, "", 1.0
    for named, parameters, lora, *cells in lines:
        task = named or task
        factor = next((value for end, value in FACTORS.items() if task.endswith(end)), factor)
        scale = factor / float(lora) if factor < 0 else factor
        row = found.setdefault((task, float(parameters.rpartition("=")[2])), {})
        for method, cell in zip(header[3:], cells, strict=True):
            if cell:
                mean, interval = (float(number) for number in cell.strip("*").split(" ± "))
                last_digit = 10.0 ** -len(cell.strip("*").rpartition(".")[2])
                rounding = abs(scale) * (0.51 * last_digit + 0.002 * abs(mean))  # LoRA's figure is rounded, too
                row[method] = (scale * mean, abs(scale) * interval, rounding, cell.startswith("**"))
    return found


def test_marks_are_the_cells_of_the_table():
    rows, names = table(), {method: name for method, (name, _) in drawing["METHODS"].items()}
    drawn = drawing["summary"]()
    assert [row.budget for row in drawn] == [budget for _, budget in rows]
    for row, cells in zip(drawn, rows.values(), strict=True):
        found = {names[mark.method]: mark for mark in drawing["marks"](row)}
        assert found.keys() == cells.keys() & set(names.values())
        for name, mark in found.items():
            mean, interval, rounding, bold = cells[name]
            assert abs(mark.centre - mean) <= rounding and abs(mark.interval - interval) <= rounding
            assert mark.verdict == ("not told apart" if not bold else "better" if mark.centre > 0 else "worse")


def test_the_kept_picture_is_of_these_results_and_opaque():
    with Image.open(SCRIPT.with_suffix(".png")) as picture:
        assert picture.text["Description"] == drawing["description"](), "run python docs/figures/results.py"
        assert picture.convert("RGBA").getextrema()[3] == (255, 255)
