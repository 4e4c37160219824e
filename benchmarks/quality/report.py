"""Turn the JSON lines into the tables of `README.md` beside this script, and into Pareto pictures.

    python benchmarks/quality/report.py

Writes the tables between their markers, and PNG files into results/. `--check` writes nothing, and fails if a table is
not what the results say.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from markers import replaced

from quality import plan
from quality.cells import Store
from quality.comparison import interval, paired
from quality.figures import pareto
from quality.methods import DEFAULT, LORA, METHODS
from quality.plan import BUDGET, Entry, Results
from quality.reported import Compared, Reported, by_seed, compared, mean, pooled, reported
from quality.tasks import TASKS

HERE = Path(__file__).resolve().parent
SIGNIFICANT = 0.05


def families() -> list[str]:
    return list(dict.fromkeys(name.partition("/")[0] for name in TASKS))


def unit(family: str) -> tuple[float, str]:
    """By what a metric is multiplied, and how it is shown: accuracies in points."""
    task = next(task for task in TASKS.values() if task.name.startswith(f"{family}/"))
    return (100.0, ".1f") if task.metric == "accuracy" else (1.0, ".2f" if task.metric == "perplexity" else ".3f")


def progress_table(results: Results) -> str:
    """Which stages are done."""
    lines = ["| stage | cells run | known to be left |", "|---|---|---|"]
    seconds = sum(result["seconds"] for result in results.values())
    for number in plan.STAGES:
        try:
            wanted = plan.stage(number, results)
        except ValueError as error:
            lines.append(f"| {number} | 0 | {str(error).partition(';')[0]} |")
            continue
        entries = {entry for entry, _ in wanted}
        ran = sum(Entry(cell.task, cell.method, cell.budget) in entries for cell in results)
        left = plan.pending(wanted, results, further=number == plan.SETTLING)
        untuned = {Entry(cell.task, cell.method, cell.budget) for cell in left if cell.seed in plan.TUNING_SEEDS}
        more = f", and the seeds of {len(untuned)} points after their rates" if untuned and number > 1 else ""
        lines.append(f"| {number} | {ran:,} | {f'{len(left):,}{more}' if left else 'none: complete'} |")
    return "\n".join([*lines, "", f"{len(results):,} cells in {seconds / 3600:.1f} hours of one thread."])


def selection_table(results: Results) -> str:
    """What stage 1 selected by: the validation metric of the tuning seeds at the best rate."""
    entries = {(entry.task, entry.method): entry for entry, _ in plan.stage_one()}
    tasks = list(dict.fromkeys(task for task, _ in entries))
    order = plan.ranking(results, list(entries.values()))
    others = [name for name in METHODS if name not in order]
    lines = [f"| method | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name in [*order, *others]:
        cells = []
        for task in tasks:
            entry = entries.get((task, name))
            found = entry and plan.tuning(entry, results, TASKS[task].higher_is_better)
            if not found or found.chosen is None:
                cells.append("")
                continue
            factor, shown = unit(entry.family)
            rate = found.first_choice(TASKS[task].higher_is_better)
            cells.append(f"{factor * found.means[rate]:{shown}} ({rate:g})")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def row_of(item: Compared, family: str, higher_is_better: bool) -> str:
    factor, shown = unit(family)
    row = item.row
    values = list(row.tests.values())
    cells = [
        f"LoRA r={row.budget:g}" if row.budget else "",
        row.method,
        f"{row.parameters:,}",
        "" if row.rate != row.rate else f"{row.rate:g}" + "?" * row.disputed,
        f"{factor * mean(row.tests):{shown}}" + (f" ± {factor * interval(values):{shown}}" if len(values) > 1 else ""),
    ]
    if item.difference and item.adjusted is not None:
        difference = item.difference
        text = f"{factor * difference.mean:+{shown}} ± {factor * difference.interval:{shown}}"
        if item.adjusted < SIGNIFICANT:
            better = (difference.mean > 0) == higher_is_better
            text = f"**{text}** {'better' if better else 'worse'}"
        cells += [text, f"{difference.p:.3f}", f"{item.adjusted:.3f}"]
    else:
        cells += ["", "", ""]
    seeds = f"{len(values)}" + (f" ({row.diverged} diverged)" if row.diverged else "")
    if item.tasks > 1:
        seeds += f", {item.tasks} tasks"
    return f"| {' | '.join([*cells, seeds])} |"


HEADER = """| budget | method | trained | rate | test | paired difference to LoRA | p | Holm's p | seeds |
|---|---|---|---|---|---|---|---|---|"""


def pooled_tables(found: dict[str, list[Reported]]) -> str:
    """A table a family."""
    parts = []
    for family in families():
        rows = pooled(found, family)
        if not rows:
            continue
        tasks = [task for task in TASKS.values() if task.name.startswith(f"{family}/")]
        what = f"{tasks[0].metric}, {'higher' if tasks[0].higher_is_better else 'lower'} is better"
        lines = [row_of(item, family, tasks[0].higher_is_better) for item in rows]
        parts.append("\n".join([f"**{family}** ({what}; mean over tasks)\n", HEADER, *lines]))
    return "\n\n".join(parts) or "Nothing yet."


def paired_tables(found: dict[str, list[Reported]]) -> str:
    """A table a task."""
    parts = []
    for name, rows in found.items():
        if rows:
            task = TASKS[name]
            lines = [row_of(item, name.partition("/")[0], task.higher_is_better) for item in compared(rows)]
            parts.append("\n".join([f"**{name}** ({task.metric})\n", HEADER, *lines]))
    return "\n\n".join(parts) or "Nothing yet."


def rates_table(results: Results) -> str:
    """What a method loses on validation at the rate that LoRA chose, by family: the cost of a script made for LoRA."""
    lines = [f"| method | {' | '.join(families())} |", "|---" * (len(families()) + 1) + "|"]
    for name, method in METHODS.items():
        if method.group not in ("WaRA", "peer") or name == LORA:
            continue
        cells = []
        for family in families():
            losses, factors = [], []
            for task in TASKS.values():
                if not task.name.startswith(f"{family}/"):
                    continue
                own, lora = (
                    plan.tuning(Entry(task.name, of, BUDGET), results, task.higher_is_better) for of in (name, LORA)
                )
                if own.chosen is not None and lora.chosen is not None and lora.chosen in own.means:
                    losses.append(abs(own.means[own.chosen] - own.means[lora.chosen]))
                    factors.append(own.chosen / lora.chosen)
            factor, shown = unit(family)
            text = (
                f"{factor * statistics.mean(losses):{shown}} (× {statistics.geometric_mean(factors):.1f})"
                if losses
                else ""
            )
            cells.append(text)
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rule_table(results: Results, found: dict[str, list[Reported]]) -> str:
    """At the rate that LoRA chose: what WaRA differs from LoRA with its scaling as it is, and scaled by the rule."""
    lora = {
        row.task: row.tests for rows in found.values() for row in rows if (row.method, row.budget) == (LORA, BUDGET)
    }
    by_method: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for entry, cells in plan.rule_cells(results).items():
        tests = {seed: results[cell]["test"] for seed, cell in cells.items() if cell in results}
        tests = {seed: value for seed, value in tests.items() if value is not None}
        if tests and entry.task in lora:
            by_method.setdefault((entry.family, entry.method), {})[entry.task] = tests
    lines = ["| family | method | paired difference to LoRA at its rate | p | seeds |", "|---|---|---|---|---|"]
    for (family, method), of_tasks in by_method.items():
        own, baseline = by_seed(list(of_tasks.values())), by_seed([lora[task] for task in of_tasks])
        difference = paired(own, baseline)
        if difference:
            factor, shown = unit(family)
            text = f"{factor * difference.mean:+{shown}} ± {factor * difference.interval:{shown}}"
            lines.append(
                f"| {family} ({len(of_tasks)}) | {method} | {text} | {difference.p:.3f} | {difference.pairs} |"
            )
    return "\n".join(lines)


def wavelet_table(found: dict[str, list[Reported]]) -> str:
    """`subband` with one level beside GraLoRA, which has its parameters and rank: what differs is the basis."""
    lines = ["| family | budget | paired difference to GraLoRA | p | seeds |", "|---|---|---|---|---|"]
    for family in families():
        rows = [row for name, rows in found.items() if name.startswith(f"{family}/") for row in rows]
        for budget in plan.BUDGETS[:3]:
            own, other = (
                {row.task: row.tests for row in rows if (row.method, row.budget) == (method, budget)}
                for method in (DEFAULT, "GraLoRA")
            )
            if not other or own.keys() != other.keys():
                continue
            difference = paired(by_seed(list(own.values())), by_seed([other[task] for task in own]))
            if difference:
                factor, shown = unit(family)
                text = f"{factor * difference.mean:+{shown}} ± {factor * difference.interval:{shown}}"
                lines.append(
                    f"| {family} ({len(own)}) | LoRA r={budget:g} | {text} | {difference.p:.3f} | {difference.pairs} |"
                )
    return "\n".join(lines)


def tables(results: Results) -> dict[str, str]:
    found = reported(results)
    return {
        "progress": progress_table(results),
        "pooled": pooled_tables(found),
        "paired": paired_tables(found),
        "selection": selection_table(results),
        "rates": rates_table(results),
        "rule": rule_table(results, found),
        "wavelet": wavelet_table(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not up to date")
    args = parser.parse_args()
    results = Store(HERE / "results", HERE / "cache" / "locks").results()
    readme = HERE / "README.md"
    text = replaced(readme, tables(results))
    if args.check:
        sys.exit(0 if readme.read_text(encoding="utf-8") == text else "Run benchmarks/quality/report.py: README.md")
    readme.write_text(text, encoding="utf-8")
    found = reported(results)
    groups = {name: method.group for name, method in METHODS.items()}
    for family in families():
        tasks = [task for task in TASKS.values() if task.name.startswith(f"{family}/") and found[task.name]]
        if tasks:
            picture = HERE / "results" / f"pareto_{family}.png"
            pareto(tasks, found, groups).savefig(picture, dpi=100, metadata={"Software": None})
    print(pooled_tables(found))


if __name__ == "__main__":
    main()
