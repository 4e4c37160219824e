"""How long does a sampling step with form="grid" take, beside LoRA of the same total rank, on the shapes of DiT-B?

    python benchmarks/grid_sampling.py

`grid` mixes tokens and cannot be merged, so each forward of sampling pays for it: LoRA is unmerged too. All adapt the
attention's projections and both layers of the MLP in blocks of DiT-B's sizes (width 768, 12 heads), with one level and
R = 16, for latents of 32 x 32 in patches of 2 x 2. "merged LoRA" is the model without adapters, which takes as long.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, PeftConfig, get_peft_model

from wara_peft import WaRAConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
RANK = 16
LATENTS = (4, 32, 32)


def step(config: PeftConfig | None, blocks: int, batch: int, device: str) -> Callable[[], None]:
    """One forward without gradients."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=12, attention_head_dim=64, num_layers=blocks, sample_size=32)
    if config is not None:
        config.target_modules = set(TARGETS)
        model = get_peft_model(model, config)
    model = model.to(device).eval()
    latents = torch.randn(batch, *LATENTS, device=device)
    steps, classes = torch.full((2, batch), 7, device=device)

    @torch.no_grad()
    def run() -> None:
        model(latents, timestep=steps, class_labels=classes)

    return run


if __name__ == "__main__":
    options = harness.parser(__doc__, "grid_sampling").parse_args()
    blocks, batch = (1, 1) if options.smoke else (2, 4)
    variants = {
        "LoRA r=16": LoraConfig(r=RANK, lora_alpha=RANK),
        "merged LoRA": None,
        "WaRA grid": WaRAConfig(form="grid", r=RANK // 4),
        "WaRA grid, shared pair": WaRAConfig(form="grid", grid_pairs="shared", r=RANK),
    }
    steps = {name: step(config, blocks, batch, options.device) for name, config in variants.items()}
    seconds = harness.interleaved(steps, options.rounds, device=options.device)
    settings = {"R": RANK, "blocks": blocks, "batch": batch, "tokens": LATENTS[1] * LATENTS[2] // 4}
    harness.save(options, {**settings, "methods": harness.summary(seconds, "LoRA r=16")})
