"""How much faster is WaRA's own export to LoRA than `peft.convert_to_lora` on the same ΔW?

    python benchmarks/export_time.py

An adapter with the shapes of Llama-3.2-3B's q_proj and v_proj: 28 layers, 3072 → 3072 and 3072 → 1024, r=4, so R = 16.
PEFT builds each dense ΔW and takes its SVD, minutes for the whole, so it is timed on one layer's two modules in each
round, beside the exact copy and the truncation to rank 16. These two are timed on all 28 layers as well.
"""

from __future__ import annotations

import harness
import torch
from peft import convert_to_lora, get_peft_model
from torch import nn

from wara_peft import WaRAConfig, lora_error, to_lora

LAYERS, HIDDEN, KEY_VALUE, RANK = 28, 3072, 1024, 16


class Projections(nn.Module):
    """q_proj and v_proj of one layer."""

    def __init__(self, hidden: int, key_value: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, key_value, bias=False)


def adapted(layers: int, hidden: int, key_value: int) -> nn.Module:
    """Layers with random adapters; their base weights are never read, and stay empty."""
    with torch.device("meta"):
        model = nn.Sequential(*(Projections(hidden, key_value) for _ in range(layers)))
    config = WaRAConfig(r=RANK // 4, target_modules=["q_proj", "v_proj"], init_weights=False)
    model = get_peft_model(model.to_empty(device="cpu"), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "wara_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


if __name__ == "__main__":
    options = harness.parser(__doc__, "export_time", rounds=5).parse_args()
    layers, hidden, key_value = (2, 48, 32) if options.smoke else (LAYERS, HIDDEN, KEY_VALUE)
    one, whole = adapted(1, hidden, key_value), adapted(layers, hidden, key_value)
    of_one = harness.interleaved(
        {
            "peft.convert_to_lora": lambda: convert_to_lora(one, rank=RANK),
            "to_lora": lambda: to_lora(one),
            "to_lora, rank=16": lambda: to_lora(one, rank=RANK),
        },
        rounds=options.rounds,
        warmup=1,
    )
    of_all = harness.interleaved(
        {"to_lora": lambda: to_lora(whole), "to_lora, rank=16": lambda: to_lora(whole, rank=RANK)}, options.rounds
    )
    harness.save(
        options,
        {
            "shapes": {"layers": layers, "q_proj": [hidden, hidden], "v_proj": [key_value, hidden], "R": RANK},
            "times_faster_than_peft": {
                name: harness.ratio(of_one["peft.convert_to_lora"], of_one[name]) for name in list(of_one)[1:]
            },
            "one_layer": harness.summary(of_one, "to_lora"),
            "all_layers": harness.summary(of_all, "to_lora"),
            "relative_error_of_rank_8": lora_error(one, 8).total,
        },
    )
