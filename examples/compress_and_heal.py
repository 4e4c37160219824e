"""Compress two models by every solver, and heal what was lost with LoRA and with WaRA, offline.

    python examples/compress_and_heal.py
    python examples/compress_and_heal.py --full          # five seeds
    python examples/compress_and_heal.py --quick         # whether everything runs; the numbers mean nothing

MiniLM with a classifier tells which of twenty libraries a docstring is from, and a small Llama, trained here, predicts
the bytes of docstrings. Each is trained once, then compressed by every solver and allocation, and measured. What the
plain SVD with uniform ranks leaves, and what `activation` with greedy ranks does, is then healed for a few steps:

- LoRA on the factors: PEFT's LoRA cannot take a factorised layer as a whole;
- WaRA on the factors, with as many parameters;
- WaRA on the layers as a whole, with no more parameters.

Seeds decide initial values of adapters and the order of texts. Every measurement is a line of results.jsonl, and a run
that was stopped goes on where it was. Prints a table and writes compress_and_heal.json and a picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import matplotlib

matplotlib.use("Agg")  # no window: the picture goes to a file

import matplotlib.pyplot as plt
import torch
from compress_tasks import TASKS, Task
from docstring_data import load_docstrings
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats
from torch import nn
from transformers.utils import logging

from wara_peft import WaRAConfig
from wara_peft.compression import CompressionReport, calibrate, compress

BUDGETS = (0.5, 0.7, 0.3)
SOLVERS = ("svd", "fisher", "activation", "activation-fisher")
DICTIONARIES = ("dictionary-oneshot", "dictionary")
HEALED_BUDGET = 0.5
HEALED = (("svd", "uniform"), ("activation", "greedy"))
METHODS = ("LoRA on factors", "WaRA on factors", "WaRA on layers")
LORA_RANK, LORA_RATE, WARA_RATE = 4, 1e-3, 4e-3
CALIBRATION_BATCHES = 32
Cell = dict[str, Any]


def stop(message: str) -> NoReturn:
    """End with a single line on stderr and exit status 1."""
    sys.exit(f"compress_and_heal.py: error: {message}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--full", action="store_true", help="five seeds in place of three")
    add("--output", type=Path, default=Path("compress_and_heal_output"), help="folder (default: %(default)s)")
    add("--quick", action="store_true", help="two seeds and a few steps on a few texts, and few cells")
    args = parser.parse_args()
    args.seeds = 2 if args.quick else 5 if args.full else 3
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--output {args.output} cannot be used as a folder: {error.strerror}")
    return args


# 1. What there is to measure


def cells(quick: bool, seeds: int) -> Iterator[Cell]:
    """Of one task: the dense model, each way to compress it, and each way to heal; `seed` is that of the healing."""
    yield {"solver": "dense", "allocation": "", "budget": 1.0, "method": "", "seed": 0}
    solvers = ("svd", "activation") if quick else SOLVERS
    for budget in (HEALED_BUDGET,) if quick else BUDGETS:
        ways = [(solver, allocation) for solver in solvers for allocation in ("uniform", "greedy")]
        if budget == HEALED_BUDGET:
            ways += [(solver, "cost") for solver in solvers]
            ways += [(solver, "depth") for solver in solvers]  # of keys and values alone
            ways += [(solver, "uniform") for solver in (DICTIONARIES[:1] if quick else DICTIONARIES)]
        for solver, allocation in ways:
            yield {"solver": solver, "allocation": allocation, "budget": budget, "method": "", "seed": 0}
    for seed in range(seeds):  # outside, so that no method has the machine's quiet hour to itself
        for solver, allocation in HEALED:
            for method in METHODS:
                yield {
                    "solver": solver,
                    "allocation": allocation,
                    "budget": HEALED_BUDGET,
                    "method": method,
                    "seed": seed,
                }


# 2. Compressing and healing


def compressed(dense: nn.Module, task: Task, found: Any, cell: Cell) -> tuple[nn.Module, CompressionReport]:
    model = copy.deepcopy(dense)
    targets = None if cell["allocation"] == "depth" else task.targets
    report = compress(
        model,
        cell["budget"],
        cell["solver"],
        found,
        cell["allocation"],
        target_modules=targets,
        show_progress_bar=False,
    )
    return model.requires_grad_(False), report


def config_for(method: str, model: nn.Module, report: CompressionReport) -> PeftConfig:
    """An adapter of each target; a layer that stayed dense has one of LoRA's rank, or of as many parameters."""
    factors, whole = [], [layer.name for layer in report.layers]
    for layer in report.layers:
        factors += [layer.name] if layer.rank is None else [f"{layer.name}.down", f"{layer.name}.up"]
    if method == "LoRA on factors":
        return LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=factors)
    if method == "WaRA on factors":
        return WaRAConfig(r=LORA_RANK // 2, target_modules=factors)
    ranks = {}
    for layer in report.layers:
        m, n = layer.shape
        both = m + n if layer.rank is None else m + n + 2 * layer.rank
        units = LORA_RANK * both * 2 // (m + n)  # a rank of one subband has (m + n) / 2 parameters
        names = ("aa1", "ad1", "da1", "dd1")
        ranks[layer.name] = {name: units // 4 + (index < units % 4) for index, name in enumerate(names)}
    return WaRAConfig(target_modules=whole, rank_pattern=ranks)


def healed(model: nn.Module, report: CompressionReport, task: Task, cell: Cell) -> tuple[nn.Module, int]:
    """The model with an adapter trained and merged, and how many parameters that had."""
    torch.manual_seed(cell["seed"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "levels=1 is more than is useful")  # of factors of a low rank
        tuned = get_peft_model(model, config_for(cell["method"], model, report))
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    rate = LORA_RATE if cell["method"].startswith("LoRA") else WARA_RATE
    task.train(tuned, task.heal_steps, rate, cell["seed"])
    return tuned.merge_and_unload(), trained


def measured(dense: nn.Module, task: Task, found: Any, cell: Cell) -> dict[str, Any]:
    """A line of results.jsonl."""
    started = time.perf_counter()
    model, share, trained, kept = dense, 1.0, 0, parameters(dense)
    if cell["solver"] != "dense":
        model, report = compressed(dense, task, found, cell)
        # The places of a dictionary's values are no parameters, and count as in the report.
        kept += report.parameters_after - report.parameters_before
        share = report.parameters_after / report.parameters_before
    if cell["method"]:
        model, trained = healed(model, report, task, cell)
    seconds = time.perf_counter() - started
    return {
        **cell,
        "task": task.name,
        "value": task.evaluate(model),
        "share_of_targets": share,
        "parameters": kept,
        "adapter_parameters": trained,
        "seconds": seconds,
    }


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# 3. A run that can be stopped


def read_results(path: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that are there, if they were measured with these options; the first line has them."""
    if not path.exists():
        path.write_text(json.dumps(options) + "\n")
    lines = path.read_text().splitlines()
    try:
        before, *results = [json.loads(line) for line in lines]
    except ValueError:
        stop(f"{path} has a line that is no JSON: a run was stopped while it wrote. Remove that line, or the file")
    if before != options:
        stop(f"{path} is of a run with {before}, not {options}. Choose another --output, or remove it")
    return results


def dense_model(task: Task, path: Path) -> nn.Module:
    """The dense model: trained now, or by the run before."""
    if path.exists():
        model = task.new_model()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model = task.dense(seed=0)
    partial = path.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    partial.replace(path)
    return model


def run(
    task: Task, wanted: list[Cell], done: list[dict[str, Any]], args: argparse.Namespace, advance: Callable
) -> None:
    """Measure what is not there yet."""
    there = {key(line) for line in done}
    missing = [cell for cell in wanted if key({**cell, "task": task.name}) not in there]
    advance(len(wanted) - len(missing))
    if not missing:
        return
    dense = dense_model(task, args.output / f"dense-{task.name.replace(' ', '-')}.pt")
    batches = list(islice(task.batches("train", torch.Generator().manual_seed(0)), CALIBRATION_BATCHES))
    with warnings.catch_warnings():
        if args.quick:
            warnings.filterwarnings("ignore", "Too few samples for a regular moment")
        kinds = ("inputs", "gradients", "fisher")
        found = calibrate(dense, batches, kinds, target_modules=task.targets, show_progress_bar=False)
    for cell in missing:
        line = measured(dense, task, found, cell)
        with (args.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        done.append(line)
        advance(1)


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("task", "solver", "allocation", "budget", "method", "seed"))


# 4. What is shown


def summaries(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, with Student's interval where there are several."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in results:
        groups.setdefault(key(line)[:-1], []).append(line)
    rows = []
    for lines in groups.values():
        values, n = [line["value"] for line in lines], len(lines)
        half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5 if n > 1 else None
        row = {name: value for name, value in lines[0].items() if name not in ("seed", "value", "seconds")}
        rows.append({**row, "mean": statistics.mean(values), "interval": half, "values": values})
    return rows


def print_tables(rows: list[dict[str, Any]], tasks: list[Task], console: Console) -> None:
    for task in tasks:
        table = Table("solver", "allocation", "healed with", title=f"{task.name}: {task.metric}, test split")
        for column in ("budget", "parameters", "adapter's", task.metric.split()[0]):
            table.add_column(column, justify="right")
        for row in rows:
            if row["task"] != task.name:
                continue
            half = "" if row["interval"] is None else f" ± {row['interval']:.2f}"
            table.add_row(
                row["solver"],
                row["allocation"],
                row["method"],
                f"{row['budget']:.0%}",
                f"{row['parameters']:,}",
                f"{row['adapter_parameters']:,}" if row["method"] else "",
                f"{row['mean']:.2f}{half}",
            )
        console.print(table)


def draw(rows: list[dict[str, Any]], tasks: list[Task], path: Path) -> None:
    """The metric against the parameters that are left, and what healing makes of it."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(7 * len(tasks), 5), layout="constrained")
    for panel, task in zip(axes, tasks, strict=True):
        own = [row for row in rows if row["task"] == task.name and row["allocation"] != "depth"]
        (dense,) = (row for row in own if row["solver"] == "dense")
        panel.axhline(dense["mean"], color="grey", linestyle=":", label="dense")
        for colour, solver in enumerate((*SOLVERS, *DICTIONARIES)):
            for style, allocation in (("--", "uniform"), ("-", "greedy")):
                found = [
                    row for row in own if (row["solver"], row["allocation"], row["method"]) == (solver, allocation, "")
                ]
                points = sorted((row["parameters"], row["mean"]) for row in found)
                if points:
                    label = f"{solver}, {allocation}"
                    panel.plot(*zip(*points, strict=True), f"o{style}", color=f"C{colour}", label=label)
        for row in own:
            if row["method"]:
                marker = "Ds^"[METHODS.index(row["method"])]
                size = row["parameters"] + row["adapter_parameters"]
                panel.errorbar(
                    size, row["mean"], row["interval"], fmt=marker, color=f"C{SOLVERS.index(row['solver'])}"
                )
        for method, marker in zip(METHODS, "Ds^", strict=True):
            panel.plot([], [], marker, color="black", label=f"healed: {method}")
        if not task.higher_is_better:
            panel.set_yscale("log")
        panel.set(xlabel="parameters of the model, adapters included", ylabel=task.metric, title=task.name)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    args = parse_arguments()
    started = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 120)
    logging.set_verbosity_error()  # of the classifier's weights, which are new
    logging.disable_progress_bar()
    try:
        data = load_docstrings(max_per_class=15 if args.quick else 60)
    except (RuntimeError, ValueError) as error:
        stop(str(error))
    tasks = [task(data, args.quick) for task in TASKS]
    # Seeds do not count: more of them go on in the same file.
    versions = {"quick": args.quick, "texts": len(data.train), "torch": torch.__version__}
    done = read_results(args.output / "results.jsonl", versions)
    wanted = list(cells(args.quick, args.seeds))
    with Progress(console=console) as progress:
        for task in tasks:
            bar = progress.add_task(task.name, total=len(wanted))
            run(task, wanted, done, args, lambda count, bar=bar: progress.advance(bar, count))
    rows = summaries(done)
    result = {
        "options": {**versions, "seeds": args.seeds, "threads": torch.get_num_threads()},
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    (args.output / "compress_and_heal.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, tasks, args.output / "compress_and_heal.png")
    print_tables(rows, tasks, console)
    console.print(f"Saved compress_and_heal.json and compress_and_heal.png in {args.output}")


if __name__ == "__main__":
    main()
