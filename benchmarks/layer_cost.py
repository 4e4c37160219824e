"""What does the adapter of one layer cost by itself, beside LoRA of the same total rank, and how does it grow?

    python benchmarks/layer_cost.py

The cost is a training step of a layer (forward, backward to the input and the adapter) less the step of its frozen
base with an input that requires a gradient. On wide layers the base's own step is a hundred times as long, and its
noise larger than the difference, so here the base is a layer of the same width whose forward returns zeros: what is
left is the adapter alone. For the widths where the base is affordable the difference is measured too, as a check.
`--profile` measures nothing, and prints where one step's time goes at width 1024 with 512 tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import harness
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from wara_peft import WaRAConfig

WIDTHS, TOKENS = (768, 1024, 2048, 4096, 8192), (512, 2048)
SWEEP_WIDTH, SWEEP_TOKENS = 2048, 512
WAVELETS = ("haar", "db2", "db4", "db8", "db16")


class FreeLinear(nn.Linear):
    """A base layer that costs next to nothing: its weight has no memory, and its result is zero."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False, device="meta")
        self.weight = nn.Parameter(torch.zeros(1).expand(width, width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def step(layer: Callable[[Tensor], Tensor], tokens: int, width: int, device: str) -> Callable[[], None]:
    """Forward and backward of a layer, with a fixed gradient of its result."""
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    gradient = torch.randn(tokens, width, device=device)
    parameters = [p for p in layer.parameters() if p.requires_grad] if isinstance(layer, nn.Module) else []

    def run() -> None:
        result = layer(x)
        if result.requires_grad:
            result.backward(gradient)
        for tensor in (x, *parameters):
            tensor.grad = None

    return run


def adapted(base: nn.Linear, config: PeftConfig, device: str) -> nn.Module:
    config.target_modules = {"0"}
    model = get_peft_model(nn.Sequential(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "wara_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.to(device).base_model.model[0]


def costs(variants: dict[str, PeftConfig], tokens: int, width: int, options: Any) -> dict[str, list[float]]:
    steps = {
        name: step(adapted(FreeLinear(width), config, options.device), tokens, width, options.device)
        for name, config in variants.items()
    }
    return harness.interleaved(steps, options.rounds, warmup=3, device=options.device)


def with_real_base(tokens: int, width: int, options: Any) -> float:
    """(WaRA − base) / (LoRA − base), of medians."""
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    layers = {
        "base": base.to(options.device),
        "LoRA": adapted(base, LoraConfig(r=16, lora_alpha=16), options.device),
        "WaRA": adapted(base, WaRAConfig(r=4), options.device),
    }
    steps = {name: step(layer, tokens, width, options.device) for name, layer in layers.items()}
    seconds = harness.interleaved(steps, options.rounds, warmup=3, device=options.device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return round((medians["WaRA"] - medians["base"]) / (medians["LoRA"] - medians["base"]), 4)


def rows(seconds: dict[str, list[float]], baseline: str, **settings: object) -> list[dict[str, object]]:
    return [{"variant": name, **settings, **row} for name, row in harness.summary(seconds, baseline).items()]


def print_profile(config: PeftConfig, tokens: int, width: int, device: str) -> None:
    """Share of each operation in twenty steps of an adapter."""
    run = step(adapted(FreeLinear(width), config, device), tokens, width, device)
    run()
    with torch.profiler.profile() as profile:
        for _ in range(20):
            run()
    print(config.peft_type.value)
    print(profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=12, max_name_column_width=40))


if __name__ == "__main__":
    parser = harness.parser(__doc__, "layer_cost", rounds=61)
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes, and stop")
    options = parser.parse_args()
    if options.profile:
        for config in (LoraConfig(r=16, lora_alpha=16), WaRAConfig(r=4), WaRAConfig(r=4, wavelet="db4")):
            print_profile(config, 512, 1024, options.device)
        raise SystemExit
    widths, tokens = ((32, 64), (4,)) if options.smoke else (WIDTHS, TOKENS)
    sweep_width, sweep_tokens = (64, 4) if options.smoke else (SWEEP_WIDTH, SWEEP_TOKENS)
    by_width = []
    for width in widths:
        for count in tokens:
            variants = {
                "LoRA r=16": LoraConfig(r=16, lora_alpha=16),
                "WaRA haar L1": WaRAConfig(r=4),
                "WaRA db4 L1": WaRAConfig(r=4, wavelet="db4"),
            }
            by_width += rows(costs(variants, count, width, options), "LoRA r=16", width=width, tokens=count)
    by_levels = []
    for levels in (1, 2, 3, 4):
        rank = 4 * (3 * levels + 1)
        for wavelet in ("haar", "db4"):
            variants = {
                "LoRA": LoraConfig(r=rank, lora_alpha=rank),
                f"WaRA {wavelet}": WaRAConfig(r=4, levels=levels, wavelet=wavelet),
            }
            by_levels += rows(costs(variants, sweep_tokens, sweep_width, options), "LoRA", levels=levels, R=rank)[1:]
    ranks = [4 * r for r in (1, 2, 4, 8, 16, 32)]
    variants = {f"LoRA {rank}": LoraConfig(r=rank, lora_alpha=rank) for rank in ranks}
    variants |= {f"WaRA {rank}": WaRAConfig(r=rank // 4) for rank in ranks}
    seconds = costs(variants, sweep_tokens, sweep_width, options)
    by_rank = []
    for rank in ranks:
        pair = {"LoRA": seconds[f"LoRA {rank}"], "WaRA haar": seconds[f"WaRA {rank}"]}
        by_rank += rows(pair, "LoRA", R=rank)
    by_wavelet = []
    variants = {"LoRA": LoraConfig(r=16, lora_alpha=16), **{w: WaRAConfig(r=4, wavelet=w) for w in WAVELETS}}
    by_wavelet += rows(costs(variants, sweep_tokens, sweep_width, options), "LoRA")[1:]
    by_tokens = []
    for count in (8, 16) if options.smoke else (32, 128, 512, 2048, 8192):
        variants = {"LoRA": LoraConfig(r=16, lora_alpha=16), "WaRA haar": WaRAConfig(r=4)}
        by_tokens += rows(costs(variants, count, sweep_width, options), "LoRA", tokens=count)
    harness.save(
        options,
        {
            "by_width": by_width,
            "by_levels": by_levels,
            "by_rank": by_rank,
            "by_wavelet": by_wavelet,
            "by_tokens": by_tokens,
            "difference_to_a_real_base": {str(width): with_real_base(512, width, options) for width in widths[:3]},
        },
    )
