"""What the main README shows: LoRA, and the differences of others to it, over each family of tasks of `quality`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quality.cells import Store
from quality.methods import DEFAULT, LORA
from quality.report import SIGNIFICANT, unit
from quality.reported import Compared, mean, pooled, reported

FAMILIES = {
    "digits-long": "digits with a ViT, 300 steps: accuracy, %",
    "digits": "digits with a ViT, 80 or 100 steps: accuracy, %",
    "conv": "digits with a convolutional network: accuracy, %",
    "docstrings": "texts with MiniLM: accuracy, %",
    "language": "texts with a small Llama: perplexity, lower is better",
    "translation": "messages with SmolLM2-135M: nats a token, lower is better",
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


@dataclass(frozen=True)
class Row:
    """What methods differ from LoRA by, over a family of tasks, at the parameters of LoRA of rank `budget`."""

    family: str
    budget: float
    lora: Compared
    others: dict[str, Compared]
    """By method; without those that ran on other tasks of the family than LoRA."""


def summary() -> list[Row]:
    results = Path(__file__).parent / "quality" / "results"
    found = reported(Store(results, results).results())
    rows = []
    for family in FAMILIES:
        by_point = {(item.row.budget, item.row.method): item for item in pooled(found, family)}
        for budget in BUDGETS:
            lora = by_point.get((budget, LORA))
            if lora is not None:
                others = {method: by_point[budget, method] for method in OTHERS if (budget, method) in by_point}
                others = {method: item for method, item in others.items() if fits(item, lora)}
                if others:
                    rows.append(Row(family, budget, lora, others))
    return rows


def fits(item: Compared, lora: Compared) -> bool:
    return item.tasks == lora.tasks and item.difference is not None and item.adjusted is not None


def summary_table() -> str:
    rows = summary()
    ran = {method for row in rows for method in row.others}
    others = {method: name for method, name in OTHERS.items() if method in ran}  # no column for what was not run
    lines = [f"| task | parameters of | LoRA | {' | '.join(others.values())} |", "|---" * (len(others) + 3) + "|"]
    named = ""
    for row in rows:
        factor, shown = unit(row.family)
        cells = [_cell(row.others.get(method), row.family) for method in others]
        name = "" if row.family == named else FAMILIES[row.family]  # the rows below are of the same tasks
        named = row.family
        value = f"{factor * mean(row.lora.row.tests):{shown}}"
        lines.append(f"| {name} | LoRA r={row.budget:g} | {value} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(item: Compared | None, family: str) -> str:
    if item is None:
        return ""
    text = difference_text(item, family)
    return f"**{text}**" if significant(item) else text


def difference_text(item: Compared, family: str) -> str:
    """The difference to LoRA and half of its interval, in the unit of the family's metric."""
    assert item.difference is not None
    factor, shown = unit(family)
    return f"{factor * item.difference.mean:+{shown}} ± {factor * item.difference.interval:{shown}}"


def significant(item: Compared) -> bool:
    return item.adjusted is not None and item.adjusted < SIGNIFICANT
