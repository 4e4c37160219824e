"""How far do a step's and a generate's ratios to LoRA depend on threads, on the kernels' instructions and on width?

    python benchmarks/settings.py

A training step of the decoder of `models.py`, and `generate` of some tokens with no scope around it, for each
combination of threads, of PyTorch's instruction sets (`ATEN_CPU_CAPABILITY`) and of width. Each combination has a
process of its own, as a process chooses threads and instructions when it starts. Ranges are those of the medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import models
import torch
from decode import generated
from peft import LoraConfig, PeftConfig

from wara_peft import WaRAConfig

WIDTHS = (768, 2048)
HAAR, DB4 = "WaRA haar L1", "WaRA db4 L3"
# by name: what is compared with what
STEPS = {
    "step, haar L1 / LoRA r=8": (HAAR, "LoRA r=8"),
    "step, haar L1 / LoRA r=16": (HAAR, "LoRA r=16"),
    "step, db4 L3 / LoRA r=40": (DB4, "LoRA r=40"),
}
GENERATE = "generate, haar L1 / LoRA r=16"


def configs(targets: list[str], names: set[str], **fields: Any) -> dict[str, PeftConfig]:
    found: dict[str, PeftConfig] = {f"LoRA r={r}": LoraConfig(r=r, lora_alpha=r) for r in (8, 16, 40)}
    found |= {name: WaRAConfig(**models.WARA[name]) for name in (HAAR, DB4)}
    for config in found.values():
        config.target_modules = set(targets)
        for field, value in fields.items():
            setattr(config, field, value)
    return {name: config for name, config in found.items() if name in names}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All ratios in this process's setting."""
    steps: dict[str, Callable[[], object]] = {}
    shape = models.decoder(options.smoke, width=options.width)
    tokens = torch.randint(1000, (shape.batch, shape.tokens))
    for name, config in configs(shape.targets, {name for pair in STEPS.values() for name in pair}).items():
        steps[name] = models.training_step(models.adapted(shape, config).train(), tokens)
    seconds = harness.interleaved(steps, options.rounds)
    found = {key: compared(seconds, *pair) for key, pair in STEPS.items()}

    calls: dict[str, Callable[[], object]] = {}
    shape = models.decoder(options.smoke, head=True, width=options.width)
    prompt = torch.ones(1, 8, dtype=torch.long)
    for name, config in configs(shape.targets, {HAAR, "LoRA r=16"}, task_type="CAUSAL_LM").items():
        calls[name] = generated(models.adapted(shape, config).eval(), prompt, options.tokens)
    found[GENERATE] = compared(harness.interleaved(calls, options.rounds), HAAR, "LoRA r=16")
    return {"capability": torch.backends.cpu.get_cpu_capability(), "ratios": found}


def compared(seconds: dict[str, list[float]], variant: str, baseline: str) -> dict[str, Any]:
    row = harness.summary(seconds, baseline)
    return {**row[variant], "median_seconds_of_lora": row[baseline]["median_seconds"]}


def in_a_process(options: argparse.Namespace, threads: int, capability: str, width: int) -> dict[str, Any]:
    """`measure` in a process with that setting."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with TemporaryDirectory() as folder:
        output = Path(folder) / "setting.json"
        arguments = ["--width", width, "--rounds", options.rounds, "--tokens", options.tokens, "--output", output]
        command = [sys.executable, __file__, *map(str, arguments), *(["--smoke"] if options.smoke else [])]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(output.read_text())
    setting = {"threads": threads, "capability": found["capability"], "width": width}
    print(setting, {name: row["ratio"] for name, row in found["ratios"].items()}, file=sys.stderr, flush=True)
    return {**setting, "ratios": found["ratios"]}


def capabilities() -> list[str]:
    """PyTorch's instruction sets up to the one that this machine's processor has."""
    known = ["default", "avx2", "avx512"]
    own = torch.backends.cpu.get_cpu_capability().lower()
    return known[: known.index(own) + 1] if own in known else [own]


if __name__ == "__main__":
    parser = harness.parser(__doc__, "settings", rounds=15)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a generate (default: %(default)s)")
    parser.add_argument("--width", type=int, help="measure in this process only, at this width")
    options = parser.parse_args()
    if options.width is not None:
        harness.save(options, measure(options))
        raise SystemExit
    chosen = (1,), capabilities()[:1], (32,)
    if not options.smoke:
        chosen = range(1, min(os.cpu_count() or 1, 2) + 1), capabilities(), WIDTHS
    settings = [in_a_process(options, *setting) for setting in itertools.product(*chosen)]
    ranges = {}
    for name in (*STEPS, GENERATE):
        ratios = [setting["ratios"][name]["ratio"] for setting in settings]
        ranges[name] = [min(ratios), max(ratios)]
    harness.save(options, {"new_tokens": options.tokens, "ranges": ranges, "settings": settings})
