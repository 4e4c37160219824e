"""Compress models by every solver, and heal what was lost with LoRA and with WaRA, offline.

    python examples/compress_and_heal.py
    python examples/compress_and_heal.py --full             # five seeds, and K-SVD of MiniLM, which takes ten minutes
    python examples/compress_and_heal.py --models smollm2   # a real language model, for two hours on one core
    python examples/compress_and_heal.py --quick            # whether everything runs; the numbers mean nothing

MiniLM with a classifier tells which of twenty libraries a docstring is from, and a small Llama, trained here, predicts
the bytes of docstrings. Each is trained once, then compressed by every solver and allocation, and measured. What the
plain SVD with uniform ranks leaves, and what `activation` with greedy ranks does, is then healed for a few steps:

- LoRA on the factors: PEFT's LoRA cannot take a factorised layer as a whole;
- WaRA on the factors, with as many parameters;
- WaRA on the layers as a whole, with no more parameters.

`--models smollm2` compresses SmolLM2-135M-Instruct, which needs no training, to 80 and 60 % of its layers' parameters,
and heals the factors of two solvers. Each result is measured as it is and with its layers, factors and those that
stayed dense, quantized to nf4, beside the bytes that these layers take.

Seeds decide initial values of adapters and the order of texts. Learning rates were chosen by `--tune`: with other
seeds, on the validation split. Every measurement is a line of compress_and_heal.jsonl, and a run that was stopped goes
on where it was. Prints tables and draws a picture.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import torch
from compress_report import (  # it finds the benchmarks
    HEALING,
    SEEDS,
    TUNING_SEEDS,
    draw,
    draw_bytes,
    table,
    tuning_table,
)
from compress_storage import DEFAULT, STORAGES, stored
from compress_tasks import TASKS, SmolLM2, Task
from docstring_data import load_docstrings
from harness import environment
from peft import LoraConfig, PeftConfig, get_peft_model
from quality.cells import Cell, Store
from rich.console import Console
from rich.progress import Progress
from study_options import make_folders, parse_study, stop, study_parser
from torch import nn
from transformers.utils import logging

from wara_peft import WaRAConfig
from wara_peft.compression import CompressionReport, LayerStatistics, calibrate, compress, load_statistics
from wara_peft.compression.methods import METHODS

BUDGETS = (0.5, 0.7, 0.3)
SOLVERS = ("svd", "fisher", "activation", "activation-fisher")
HEALED_BUDGET = 0.5
HEALED = (("svd", "uniform"), ("activation", "greedy"))
SMOLLM2_BUDGETS = (0.8, 0.6)
SMOLLM2_HEALED = ("activation-fisher", "activation")
LORA_RANK = 4
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CHOSEN = {
    ("MiniLM", "LoRA on factors"): 3e-3,
    ("MiniLM", "WaRA on factors"): 3e-3,
    ("MiniLM", "WaRA on layers"): 3e-3,
    ("byte-level Llama", "LoRA on factors"): 3e-3,
    ("byte-level Llama", "WaRA on factors"): 3e-3,
    ("byte-level Llama", "WaRA on layers"): 1e-2,
    ("SmolLM2-135M", "LoRA on factors"): 3e-3,
    ("SmolLM2-135M", "WaRA on factors"): 3e-3,
}
"""Learning rates of healing, of both starting points; what `--tune` found best. SmolLM2's are the other models'."""


def parse_arguments() -> argparse.Namespace:
    parser = study_parser(__doc__, "compress_and_heal_output")
    parser.add_argument(
        "--full", action="store_true", help=f"{len(SEEDS)} seeds in place of three, and K-SVD of MiniLM"
    )
    parser.add_argument(
        "--models", nargs="+", choices=TASKS, default=["minilm", "bytes"], help="(default: minilm bytes)"
    )
    args = parse_study(parser)
    args.seeds = SEEDS[: 2 if args.quick else None if args.full else 3]
    make_folders(args)
    return args


# 1. What there is to measure


@dataclass(frozen=True)
class Run:
    """The dense model, a way to compress it, or a way to heal that; `seed` is that of the healing."""

    task: str
    solver: str = "dense"
    allocation: str = ""
    budget: float = 1.0
    method: str = ""
    rate: float = 0.0
    seed: int = 0

    @property
    def cell(self) -> Cell:
        ways = (self.solver, self.allocation, self.method)
        name = ", ".join(way for way in ways if way)
        return Cell(f"compress_and_heal/{self.task}", name, self.budget, self.rate, self.seed)


def runs_of(task: Task, args: argparse.Namespace) -> list[Run]:
    return smollm2_runs(task.name, args) if isinstance(task, SmolLM2) else trained_model_runs(task.name, args)


def smollm2_runs(task: str, args: argparse.Namespace) -> list[Run]:
    """One seed of healing, or two with `--full`. `--tune` looks at the first solver and the smaller budget only."""
    if args.tune:
        return [
            Run(task, SMOLLM2_HEALED[0], "greedy", SMOLLM2_BUDGETS[-1], method, rate, TUNING_SEEDS[0])
            for rate in RATES[:3]
            for method in HEALING[:2]
        ]
    solvers = SMOLLM2_HEALED if args.quick else SOLVERS
    budgets = SMOLLM2_BUDGETS[-1:] if args.quick else SMOLLM2_BUDGETS
    greedy = [Run(task, solver, "greedy", budget) for budget in budgets for solver in solvers]
    healing = [
        Run(task, solver, "greedy", budget, method, CHOSEN[task, method], seed)
        for seed in args.seeds[: 2 if args.full else 1]
        for budget in budgets
        for solver in SMOLLM2_HEALED
        for method in HEALING[:2]
    ]
    uniform = [Run(task, solver, "uniform", budget) for budget in budgets for solver in solvers]
    return [Run(task), *greedy, *healing, *uniform]  # what matters least comes last


def trained_model_runs(task: str, args: argparse.Namespace) -> list[Run]:
    # Seeds outside, so that no method has the machine's quiet hour to itself.
    healing = [
        Run(task, solver, allocation, HEALED_BUDGET, method, rate, seed)
        for seed in (TUNING_SEEDS if args.tune else args.seeds)
        for solver, allocation in HEALED
        for method in HEALING
        for rate in (RATES if args.tune else (CHOSEN[task, method],))
    ]
    if args.tune:
        return healing
    solvers = ("svd", "activation") if args.quick else SOLVERS
    found = [Run(task)]
    for budget in (HEALED_BUDGET,) if args.quick else BUDGETS:
        found += [Run(task, solver, ranks, budget) for solver in solvers for ranks in ("uniform", "greedy")]
        if budget == HEALED_BUDGET:
            found += [Run(task, solver, "cost", budget) for solver in solvers]
            found += [Run(task, solver, "depth", budget) for solver in solvers]  # of keys and values alone
            found.append(Run(task, "dictionary-oneshot", "uniform", budget))
    if args.full or (task == "byte-level Llama" and not args.quick):
        healing.append(Run(task, "dictionary", "uniform", HEALED_BUDGET))  # the longest last
    return found + healing


# 2. Compressing and healing


def compressed(dense: nn.Module, task: Task, found: Any, run: Run) -> tuple[nn.Module, CompressionReport]:
    model = copy.deepcopy(dense)
    targets = None if run.allocation == "depth" else task.targets
    report = compress(
        model,
        METHODS[run.solver](run.budget, allocation=run.allocation, target_modules=targets),
        found,
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


def healed(model: nn.Module, report: CompressionReport, task: Task, run: Run) -> tuple[nn.Module, int]:
    """The model with an adapter trained and merged, and how many parameters that had."""
    torch.manual_seed(run.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "levels=1 is more than is useful")  # of factors of a low rank
        tuned = get_peft_model(model, config_for(run.method, model, report))
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    task.train(tuned, task.heal_steps, run.rate, run.seed)
    return tuned.merge_and_unload(), trained


def measured(dense: nn.Module, task: Task, found: Any, run: Run) -> dict[str, Any]:
    """What is kept of a run."""
    started = time.perf_counter()
    model, share, trained, kept = dense, 1.0, 0, parameters(dense)
    if run.solver != "dense":
        model, report = compressed(dense, task, found, run)
        # The places of a dictionary's values are no parameters, and count as in the report.
        kept += report.parameters_after - report.parameters_before
        share = report.parameters_after / report.parameters_before
    if run.method:
        model, trained = healed(model, report, task, run)
    seconds = time.perf_counter() - started
    split = "validation" if run.seed in TUNING_SEEDS else "test"
    storages: dict[str, Any] = {}
    if isinstance(task, SmolLM2) and split == "test":
        for storage in STORAGES if run.solver == "dense" else DEFAULT:
            copied, size = stored(model, list(found), storage)
            with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile for each shape of the factors
                storages[storage] = {"bytes": size, "perplexity": task.evaluate(copied, split)}
    return {
        "solver": run.solver,
        "allocation": run.allocation,
        "healed_with": run.method,
        "metric": task.metric,
        split: storages[DEFAULT[0]]["perplexity"] if storages else task.evaluate(model, split),
        **({"stored": storages} if storages else {}),
        "share_of_targets": share,
        "parameters": kept,
        "adapter_parameters": trained,
        "seconds": round(seconds, 3),
    }


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# 3. Runs that can be stopped


def dense_model(task: Task, path: Path) -> nn.Module:
    """The dense model: trained now, or by the run before, or as it comes."""
    if not task.dense_steps:
        return task.dense(seed=0)
    if path.exists():
        model = task.new_model()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model = task.dense(seed=0)
    partial = path.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    partial.replace(path)
    return model


def statistics_of(task: Task, dense: nn.Module, path: Path) -> Mapping[str, LayerStatistics]:
    """Statistics of the dense model's targets, on disk: taken now, or by the run before."""
    if not (path / "statistics.json").is_file():
        batches = list(islice(task.batches("train", torch.Generator().manual_seed(0)), task.calibration_batches))
        kinds = ("inputs", "gradients", "fisher")
        with warnings.catch_warnings():
            if task.quick:
                warnings.filterwarnings("ignore", "Too few samples for a regular moment")
            calibrate(dense, batches, kinds, target_modules=task.targets, path=path, show_progress_bar=False)
    return load_statistics(path)


def run_all(task: Task, wanted: list[Run], store: Store, args: argparse.Namespace, advance: Callable) -> None:
    """Measure what is not there yet."""
    missing = [run for run in wanted if run.cell not in store.results()]
    advance(len(wanted) - len(missing))
    if not missing:
        return
    name = task.name.replace(" ", "-")
    dense = dense_model(task, args.output_dir / f"dense-{name}.pt")
    found = statistics_of(task, dense, args.output_dir / f"statistics-{name}")
    for run in missing:
        with store.claim(run.cell) as mine:
            if mine:
                store.append(run.cell, {**measured(dense, task, found, run), **environment()})
        advance(1)


def main() -> None:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    logging.set_verbosity_error()  # of the classifier's weights, which are new
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel(ERROR)  # that int8 takes inputs of 16 bits, once a call
    most = 15 if args.quick else 120
    try:
        chosen = [
            TASKS[name](load_docstrings(max_per_class=most, num_words=TASKS[name].words), args.quick)
            for name in args.models
        ]
    except (RuntimeError, ValueError) as error:
        stop(str(error))
    store = Store(args.results, args.output_dir / "locks")
    wanted = {task: runs_of(task, args) for task in chosen}
    with Progress(console=console) as progress:
        for task, own in wanted.items():
            bar = progress.add_task(task.name, total=len(own))
            run_all(task, own, store, args, lambda count, bar=bar: progress.advance(bar, count))
    results = store.results()
    lines = [results[run.cell] for own in wanted.values() for run in own]
    if args.tune:
        names = [task.name for task in chosen]
        print(tuning_table(lines, {key: rate for key, rate in CHOSEN.items() if key[0] in names}))
        return
    print(table(lines))
    real = [line for line in lines if "stored" in line]
    others = [line for line in lines if "stored" not in line]
    for name, drawn, own in (("compress_and_heal", draw, others), ("compress_smollm2", draw_bytes, real)):
        if own:
            picture = args.results / f"{name}.png"
            drawn(own).savefig(picture, dpi=110)
            print(f"\nSaved {picture}")


if __name__ == "__main__":
    main()
