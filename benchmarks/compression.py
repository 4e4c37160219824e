"""What is lost at half of the parameters, what does compressing cost, and what does a compressed model?

    python benchmarks/compression.py
    python benchmarks/compression.py --parts accuracy reconstruction     # the others stay as the file has them
    python benchmarks/compression.py --model smollm2                     # SmolLM2, and nothing else
    python benchmarks/compression.py --model smollm2 --by-block          # only the last part

- accuracy: MiniLM, trained in full on docstrings by three seeds, at 50 % of its targets' parameters without healing.
- reconstruction: ‖(W − Ŵ) x‖² as a share of that of the outputs, of all its layers at equal bytes on held-out texts.
- solving: a layer of 2048 × 2048 with its statistics at hand, beside the SVD of its weight.
- growth: seconds and peak memory of calibrating and of solving one layer by width, each in a process of its own.
- models: bytes, tokens a second and peak memory of MiniLM as it is and compressed.

- calibrating: seconds of calibrating SmolLM2-135M, and the peak memory above that of the process with the model, each
  in a process of its own; statistics stay in memory, or go to disk.
- by_block: seconds of compressing SmolLM2-135M all at once and block by block, and the peak memory above that of the
  process before, which has imported all libraries.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import smollm2
from compress_tasks import Docstrings, SmolLM2
from docstring_data import load_docstrings

from wara_peft.compression import LayerStatistics, calibrate, compress
from wara_peft.compression.methods import METHODS
from wara_peft.compression.solvers.low_rank import Metric, low_rank
from wara_peft.compression.solvers.table import solver_of
from wara_peft.compression.statistics.layer_statistics import probe_of

PARTS = {
    "minilm": ("accuracy", "reconstruction", "solving", "growth", "models"),
    "smollm2": ("calibrating", "by_block"),
}
"""What is measured of each model, or of layers by themselves."""
DENSE_STEPS, BATCHES = 100, 32
WIDTHS = (512, 1024, 2048, 4096)
WAYS = (
    ("svd", "uniform"),
    ("svd", "greedy"),
    ("fisher", "uniform"),
    ("fisher", "greedy"),
    ("activation", "uniform"),
    ("activation", "greedy"),
    ("activation-fisher", "uniform"),
    ("activation-fisher", "greedy"),
)
# What `getrusage` says begins with the peak of the process that starts this one.
PEAK = """
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak) / 1024)
"""


@cache
def task(smoke: bool) -> Docstrings:
    found = Docstrings(load_docstrings(max_per_class=15 if smoke else 60), quick=smoke)
    if smoke:
        found.targets = r".*encoder\.layer\.0\.attention\..*"
    else:
        found.dense_steps = DENSE_STEPS
    return found


@cache
@torch.enable_grad()
def trained(smoke: bool, seed: int) -> tuple[nn.Module, Any]:
    """A dense model and its statistics."""
    dense = task(smoke).dense(seed)
    batches = list(islice(task(smoke).batches("train", torch.Generator().manual_seed(seed)), BATCHES))
    kinds = ("inputs", "gradients", "fisher")
    found = calibrate(dense, batches, kinds, target_modules=task(smoke).targets, show_progress_bar=False)
    return dense, found


def compressed(smoke: bool, seed: int, solver: str, allocation: str, budget: float | str = 0.5) -> nn.Module:
    dense, found = trained(smoke, seed)
    model = copy.deepcopy(dense)
    compress(
        model,
        METHODS[solver](budget, allocation=allocation, target_modules=task(smoke).targets),
        found,
        show_progress_bar=False,
    )
    return model


# 1. What is lost


def accuracy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """In %, of each dense model and each way to compress it."""
    smoke, rows = options.smoke, []
    for seed in range(1 if smoke else options.seeds):
        row = {"dense": task(smoke).evaluate(trained(smoke, seed)[0], "test")}
        for solver, allocation in WAYS:
            row[f"{solver}, {allocation}"] = task(smoke).evaluate(compressed(smoke, seed, solver, allocation), "test")
        rows.append({"seed": seed + 1, "accuracy": row})
    return rows


@torch.no_grad()
def reconstruction(options: argparse.Namespace) -> dict[str, Any]:
    """The mean over layers, at half of the bytes, uniformly, of the error on inputs that the dense model has."""
    smoke = options.smoke
    dense, _ = trained(smoke, 0)
    moments = calibrate(
        dense, list(task(smoke).batches("test")), target_modules=task(smoke).targets, show_progress_bar=False
    )
    result: dict[str, Any] = {}
    for solver in ("svd", "activation", "dictionary-oneshot"):
        model = compressed(smoke, 0, solver, "uniform")
        shares, size = [], 0
        for name, entry in moments.items():
            base, made = dense.get_submodule(name), model.get_submodule(name)
            # With the bias as a further input that is always 1.
            moment = nn.functional.pad(entry.moment, (0, 1, 0, 1))
            moment[-1, :-1] = moment[:-1, -1] = entry.mean
            moment[-1, -1] = 1
            whole = torch.cat((base.weight, base.bias[:, None]), 1)
            lost = whole - torch.cat((made.weight, made.bias[:, None]), 1)
            shares.append(float(Metric(moment).error(lost) / Metric(moment).error(whole)))
            size += sum(tensor.nbytes for tensor in (*made.parameters(), *made.buffers()))
        result[solver] = {"mean": float(np.mean(shares)), "median": float(np.median(shares)), "bytes": size}
    return result


# 2. What compressing costs


def layer_and_statistics(width: int, regular: bool = True) -> tuple[Tensor, LayerStatistics]:
    """A random weight, and statistics of inputs whose covariance falls off; a singular one lacks a tenth of them."""
    torch.manual_seed(0)
    weight = torch.randn(width, width) / width**0.5
    x = torch.randn(width * 2, width) * torch.linspace(2, 0.1, width)
    if not regular:
        x[:, : width // 10] = 0
    g = torch.randn(width * 2, width)
    squares = torch.rand(width)
    entry = LayerStatistics(
        (width, width), len(x), probe_of(weight), x.T @ x / len(x), x.mean(0), g.T @ g / len(g), squares
    )
    return weight, entry


def solving(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds beside the SVD of the weight alone; a regular moment takes Cholesky's factorisation, or none."""
    width = 64 if options.smoke else 2048
    regular, singular = (layer_and_statistics(width, regular) for regular in (True, False))
    weight, rank = regular[0], width // 4

    def solve(solver: str, of: tuple[Tensor, LayerStatistics]) -> Callable[[], object]:
        method = METHODS[solver](0.5)
        return lambda: low_rank(of[0], rank, solver_of(method).metric(method, of[1], True))

    variants: dict[str, Callable[[], object]] = {
        "torch.linalg.svd": lambda: torch.linalg.svd(weight.double(), full_matrices=False),
        **{solver: solve(solver, regular) for solver in ("svd", "fisher", "activation", "activation-fisher")},
        "activation, singular moment": solve("activation", singular),
        "activation-fisher, singular moment": solve("activation-fisher", singular),
    }
    seconds = harness.interleaved(variants, options.rounds, warmup=1 if options.smoke else 0)
    return {"width": width, "variants": harness.summary(seconds, "torch.linalg.svd")}


CALIBRATING = """
import time, torch
from torch import nn
from wara_peft.compression import calibrate
model = nn.Sequential(nn.Linear({width}, {width}))
batches = [torch.randn(4, 512, {width}) for _ in range(4)]
start = time.perf_counter()
calibrate(model, batches, show_progress_bar=False)
seconds = time.perf_counter() - start
"""
SOLVING = """
import time, torch
from wara_peft.compression.solvers.low_rank import low_rank
from wara_peft.compression.methods import METHODS
from wara_peft.compression.solvers.table import solver_of
from wara_peft.compression.statistics.layer_statistics import LayerStatistics, probe_of
weight = torch.randn({width}, {width})
x = torch.randn({width} + 64, {width})
entry = LayerStatistics(({width}, {width}), len(x), probe_of(weight), x.T @ x / len(x), x.mean(0))
del x
start = time.perf_counter()
method = METHODS[{solver!r}](0.5)
low_rank(weight, {width} // 4, solver_of(method).metric(method, entry, True))
seconds = time.perf_counter() - start
"""


def in_process(code: str, width: int, solver: str = "") -> tuple[float, float]:
    """Seconds, and peak MiB, of code in a process of its own."""
    text = code.format(width=width, solver=solver) + PEAK
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One run each; the first row's peak is that of a process which does next to nothing."""
    rows = []
    for width in (8, *((32, 64) if options.smoke else options.widths)):
        for what, code, solver in (
            ("calibrating with 8192 positions", CALIBRATING, ""),
            ("solving, svd", SOLVING, "svd"),
            ("solving, activation", SOLVING, "activation"),
        ):
            seconds, peak = in_process(code, width, solver)
            rows.append({"what": what, "width": width, "median_seconds": seconds, "peak_mebibytes": peak})
    return rows


# 3. What a compressed model costs

RUNNING = """
import time, torch
model = torch.load({path!r}, weights_only=False)
x = torch.randint(100, 20000, (16, 32))
start = time.perf_counter()
with torch.no_grad():
    model(input_ids=x)
seconds = time.perf_counter() - start
"""


@torch.no_grad()
def models(options: argparse.Namespace) -> dict[str, Any]:
    smoke = options.smoke
    built = {"dense": trained(smoke, 0)[0]}
    for solver, allocation, budget in (
        ("activation", "greedy", 0.7),
        ("activation", "greedy", 0.5),
        ("activation", "greedy", 0.3),
        ("dictionary-oneshot", "uniform", 0.5),
    ):
        built[f"{solver}, {allocation}, {budget:.0%}"] = compressed(smoke, 0, solver, allocation, budget)
    x = torch.randint(100, 20000, (16, 32))
    variants = {name: lambda model=model: model(input_ids=x) for name, model in built.items()}
    times = harness.summary(harness.interleaved(variants, options.rounds), "dense")
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in built.items():
            path = str(Path(folder) / "model.pt")
            torch.save(model, path)
            text = RUNNING.format(path=path) + PEAK
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
            tensors = [*model.parameters(), *model.buffers()]
            result[name] = {
                "bytes": sum(tensor.nbytes for tensor in tensors),
                "tokens_per_second": round(x.numel() / times[name]["median_seconds"]),
                **times[name],
                "peak_mebibytes": float(done.stdout.split()[-1]),
            }
    return result


# 4. What calibrating a real model costs

CALIBRATING_SMOLLM2 = """
import sys, tempfile, time, warnings
sys.path.append({examples!r})
from itertools import islice
import torch
from compress_tasks import SmolLM2
from docstring_data import load_docstrings
from wara_peft.compression import calibrate
def memory(name):
    (size,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith(name))
    return int(size) / 1024
if {smoke}:
    warnings.filterwarnings("ignore", "Too few samples for a regular moment")
task = SmolLM2(load_docstrings(max_per_class=15, num_words=SmolLM2.words), quick={smoke})
batches = list(islice(task.batches("train", torch.Generator().manual_seed(0)), {batches}))
model = task.new_model().eval()
with tempfile.TemporaryDirectory() as folder:
    open("/proc/self/clear_refs", "w").write("5")  # the peak is that of now on
    before, start = memory("VmRSS"), time.perf_counter()
    if {kinds}:
        calibrate(model, batches, {kinds}, path=folder + "/new" if {on_disk} else None, show_progress_bar=False)
    else:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    seconds = time.perf_counter() - start
    print(seconds, memory("VmHWM") - before, before, sum(batch["input_ids"].numel() for batch in batches))
"""


def calibrating(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One run each; the first row is a forward of the same batches by itself."""
    rows = []
    every = ("inputs", "gradients", "fisher")
    ways = (((), False), (every, True), (every, False), (("inputs",), True), (("inputs",), False))
    for kinds, on_disk in ways[:2] if options.smoke else ways:
        text = CALIBRATING_SMOLLM2.format(
            examples=str(Path(__file__).parents[1] / "examples"),
            smoke=options.smoke,
            batches=1 if options.smoke else 4,
            kinds=kinds,
            on_disk=on_disk,
        )
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
        seconds, above, model, tokens = map(float, done.stdout.split()[-4:])
        rows.append(
            {
                "statistics": list(kinds),
                "on_disk": on_disk,
                "tokens": int(tokens),
                "seconds": seconds,
                "peak_mebibytes_above_model": above,
                "process_with_model_mebibytes": model,
            }
        )
    return rows


# 5. What compressing it block by block takes

BY_BLOCK_METHODS = {"uniform": 'Activation(0.6, allocation="uniform")', "greedy": "Activation(0.6)"}
BY_BLOCK_WAYS = {
    "all at once": """
from transformers import AutoModelForCausalLM
from wara_peft.compression import calibrate, compress, save_compressed
model = AutoModelForCausalLM.from_pretrained(base)
compress(model, method, calibrate(model, batches, show_progress_bar=False), show_progress_bar=False)
save_compressed(model, out)
""",
    "block by block": """
from wara_peft.compression import compress_by_block
compress_by_block(base, out, method, batches, show_progress_bar=False)
""",
}
BY_BLOCK = """
import sys, time, warnings
import torch
import transformers.models.llama.modeling_llama
from wara_peft.compression import Activation
warnings.filterwarnings("ignore", "Too few samples for a regular moment")
base, out = sys.argv[1] + "/base", sys.argv[1] + "/out"
batches, method = torch.load(sys.argv[1] + "/batches.pt"), {method}
def memory(name):
    (size,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith(name))
    return int(size) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak is that of now on
before, start = memory("VmRSS"), time.perf_counter()
{way}
print(time.perf_counter() - start, memory("VmHWM") - before)
"""


def by_block(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One run each, from a directory with the model to a directory with the compressed one."""
    count, length = (2, 32) if options.smoke else (32, 256)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = load_docstrings(max_per_class=15 if options.smoke else 60)
        model = SmolLM2(data, quick=options.smoke).new_model()
        model.save_pretrained(f"{folder}/base")
        sizes = {
            "model": sum(parameter.nbytes for parameter in model.parameters()),
            "block": sum(parameter.nbytes for parameter in model.model.layers[0].parameters()),
        }
        text = "\n".join(entry.text for entry in data.train)
        # The smoke run's model reads bytes.
        every = [*text.encode()] if options.smoke else smollm2.load_tokenizer()(text, verbose=False)["input_ids"]
        tokens = torch.tensor(every[: count * length])
        torch.save([{"input_ids": part} for part in tokens.reshape(-1, length).split(4)], f"{folder}/batches.pt")
        for allocation, method in BY_BLOCK_METHODS.items():
            for way, code in BY_BLOCK_WAYS.items():
                program = BY_BLOCK.format(method=method, way=code)
                done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                seconds, peak = map(float, done.stdout.split()[-2:])
                row = {"allocation": allocation, "way": way, "seconds": seconds, "peak_mebibytes": peak}
                rows.append({**row, "tokens": len(tokens), **sizes})
                shutil.rmtree(f"{folder}/out")
    return rows


def main() -> None:
    parser = harness.parser(__doc__, "compression", rounds=5)
    every = [part for parts in PARTS.values() for part in parts]
    parser.add_argument("--model", choices=PARTS, default="minilm", help="whose parts (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=every, help="(default: those of --model)")
    parser.add_argument("--by-block", action="store_true", help="only the part by_block")
    parser.add_argument("--seeds", type=int, default=3, help="dense models for the accuracy (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="(default: %(default)s)")
    options = parser.parse_args()
    wanted = ("by_block",) if options.by_block else options.parts or PARTS[options.model]
    kept = json.loads(options.output.read_text()) if options.output.exists() and not options.smoke else {}
    measures = (accuracy, reconstruction, solving, growth, models, calibrating, by_block)
    result = {name: kept[name] for name in every if name in kept}
    result |= {part: measure(options) for part, measure in zip(every, measures, strict=True) if part in wanted}
    harness.save(options, result)


if __name__ == "__main__":
    main()
