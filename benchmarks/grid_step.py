"""How long does a training step with form="grid" take, beside LoRA of the same total rank, on the shapes of ViT-B?

    python benchmarks/grid_step.py

Both adapt query, value and both layers of the MLP in blocks of ViT-B's sizes (width 768, 12 heads, 14 x 14 patches and
a CLS token). The steps take turns, in alternating order, and each is divided by the step beside it, so that what slows
the machine down slows both. Prints the median of these ratios, and writes all of them with the versions they belong to
into benchmarks/results/grid_step.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTModel

from wara_peft import WaRAConfig

RESULT = Path(__file__).parent / "results" / "grid_step.json"
TARGETS = ["q_proj", "v_proj", "fc1", "fc2"]


def model_of(config: PeftConfig, blocks: int) -> nn.Module:
    torch.manual_seed(0)
    base = ViTModel(ViTConfig(num_hidden_layers=blocks), add_pooling_layer=False)
    return get_peft_model(base, config).train()


def step_of(model: nn.Module, pixels: torch.Tensor) -> Callable[[], None]:
    """One forward, backward and AdamW step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(pixel_values=pixels).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def interleaved_seconds(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, `repeats` times: all in turn, starting with another one each time."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-2, repeats):  # two rounds to warm up
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            steps[name]()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(r: int, levels: int, blocks: int, batch: int, repeats: int, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    configs = {
        "lora": LoraConfig(r=r * (3 * levels + 1), target_modules=TARGETS),
        "grid": WaRAConfig(form="grid", r=r, levels=levels, target_modules=TARGETS),
        "grid, shared pair": WaRAConfig(
            form="grid", grid_pairs="shared", r=r * (3 * levels + 1), levels=levels, target_modules=TARGETS
        ),
    }
    pixels = torch.randn(batch, 3, 224, 224)
    steps = {name: step_of(model_of(config, blocks), pixels) for name, config in configs.items()}
    seconds = interleaved_seconds(steps, repeats)
    ratios = {
        name: [round(ours / lora, 4) for ours, lora in zip(seconds[name], seconds["lora"], strict=True)]
        for name in configs
        if name != "lora"
    }
    return {
        "total_rank": r * (3 * levels + 1),
        "levels": levels,
        "blocks": blocks,
        "batch": batch,
        "tokens": 197,
        "threads": threads,
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "median_ratio_to_lora": {name: round(statistics.median(values), 4) for name, values in ratios.items()},
        "ratios_to_lora": ratios,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers", "PyWavelets")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=4, help="rank of a subband's pair (default: 4)")
    parser.add_argument("--levels", type=int, default=1, help="levels of the decomposition (default: 1)")
    parser.add_argument("--blocks", type=int, default=2, help="transformer blocks (default: 2)")
    parser.add_argument("--batch", type=int, default=4, help="images in a batch (default: 4)")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each method (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    options = parser.parse_args()
    arguments = {name: getattr(options, name) for name in ("r", "levels", "blocks", "batch", "repeats", "threads")}
    measured = measure(**arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))
