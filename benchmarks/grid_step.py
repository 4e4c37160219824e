"""How long does a training step with form="grid" take, beside LoRA of the same total rank, on the shapes of ViT-B?

    python benchmarks/grid_step.py

Both adapt query, value and both layers of the MLP in blocks of ViT-B's sizes (width 768, 12 heads, 14 x 14 patches and
a CLS token), with one level and R = 16.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import ViTConfig, ViTModel

from wara_peft import WaRAConfig

TARGETS = ["q_proj", "v_proj", "fc1", "fc2"]
RANK = 16


def step(config: PeftConfig, blocks: int, pixels: torch.Tensor) -> Callable[[], None]:
    """One forward, backward and AdamW step."""
    torch.manual_seed(0)
    config.target_modules = set(TARGETS)
    model = get_peft_model(ViTModel(ViTConfig(num_hidden_layers=blocks), add_pooling_layer=False), config)
    model = model.to(pixels.device).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def run() -> None:
        model(pixel_values=pixels).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


if __name__ == "__main__":
    options = harness.parser(__doc__, "grid_step").parse_args()
    blocks, batch = (1, 1) if options.smoke else (2, 4)
    pixels = torch.randn(batch, 3, 224, 224, device=options.device)
    variants = {
        "LoRA r=16": LoraConfig(r=RANK, lora_alpha=RANK),
        "WaRA grid": WaRAConfig(form="grid", r=RANK // 4),
        "WaRA grid, shared pair": WaRAConfig(form="grid", grid_pairs="shared", r=RANK),
    }
    steps = {name: step(config, blocks, pixels) for name, config in variants.items()}
    seconds = harness.interleaved(steps, options.rounds, device=options.device)
    settings = {"R": RANK, "blocks": blocks, "batch": batch, "tokens": 197}
    harness.save(options, {**settings, "methods": harness.summary(seconds, "LoRA r=16")})
