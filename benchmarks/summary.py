"""The main README's table: LoRA, and the differences of others to it, over each family of tasks of `quality`."""

from __future__ import annotations

from pathlib import Path

from quality.cells import Store
from quality.methods import DEFAULT, LORA
from quality.report import SIGNIFICANT, unit
from quality.reported import Compared, mean, pooled, reported

FAMILIES = {
    "digits-long": "digits with a ViT, 300 steps: accuracy, %",
    "digits": "the same, 80 or 100 steps",
    "conv": "digits with a convolutional network: accuracy, %",
    "docstrings": "texts with MiniLM: accuracy, %",
    "language": "texts with a small Llama: perplexity, lower is better",
    "planted": "a planted change of a layer: relative error, lower is better",
}
BUDGETS = (1.0, 4.0, 16.0)
"""Parameters, in ranks of LoRA."""
OTHERS = {
    "rsLoRA": "rsLoRA",
    DEFAULT: "`subband`",
    "WaRA grid": "`grid`",
    "MiSS": "MiSS",
    "GraLoRA": "GraLoRA",
    "WaveFT": "WaveFT",
}


def summary_table() -> str:
    results = Path(__file__).parent / "quality" / "results"
    found = reported(Store(results, results).results())
    methods = {row.method for name, rows in found.items() if name.partition("/")[0] in FAMILIES for row in rows}
    others = {method: name for method, name in OTHERS.items() if method in methods}  # no column for what was not run
    lines = [f"| task | parameters of | LoRA | {' | '.join(others.values())} |", "|---" * (len(others) + 3) + "|"]
    for family, name in FAMILIES.items():
        rows = {(item.row.budget, item.row.method): item for item in pooled(found, family)}
        factor, shown = unit(family)
        for budget in BUDGETS:
            lora = rows.get((budget, LORA))
            if lora is None:
                continue
            cells = [_cell(rows.get((budget, method)), lora, factor, shown) for method in others]
            lines.append(
                f"| {name} | LoRA r={budget:g} | {factor * mean(lora.row.tests):{shown}} | {' | '.join(cells)} |"
            )
            name = ""  # the rows below are of the same tasks
    return "\n".join(lines)


def _cell(item: Compared | None, lora: Compared, factor: float, shown: str) -> str:
    """The difference to LoRA, empty where the method ran on other tasks of the family than LoRA."""
    if item is None or item.tasks != lora.tasks or item.difference is None or item.adjusted is None:
        return ""
    text = f"{factor * item.difference.mean:+{shown}} ± {factor * item.difference.interval:{shown}}"
    return f"**{text}**" if item.adjusted < SIGNIFICANT else text
