"""How much is kept for the backward pass, beside LoRA of the same total rank?

    python benchmarks/memory.py

Bytes of the distinct storages that the forward of a layer keeps for backward, for LoRA, WaRA, and WaRA by the dense
inverse transform. The input counts, and so do the parameters of LoRA, which it keeps, as WaRA keeps Â and B̂; the
frozen base weight does not.
"""

from __future__ import annotations

import harness
import models
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from wara_peft import WaRAConfig


def saved_bytes(layer: nn.Module, base_weight: torch.Tensor, tokens: int, width: int) -> int:
    """Sizes of all distinct storages that autograd keeps from one forward."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != base_weight.untyped_storage().data_ptr():
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(tokens, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = layer(x)
    del result
    return sum(storages.values())


if __name__ == "__main__":
    options = harness.parser(__doc__, "memory", rounds=1).parse_args()
    results = []
    for width in (32, 64) if options.smoke else (768, 2048, 4096):
        base = nn.Linear(width, width, bias=False).requires_grad_(False)
        for tokens in (8,) if options.smoke else (512, 2048):
            layers = {
                f"LoRA r={r}": get_peft_model(nn.Sequential(base), LoraConfig(r=r, lora_alpha=r, target_modules=["0"]))
                for r in (16, 40)
            }
            layers |= {
                name: get_peft_model(nn.Sequential(base), WaRAConfig(target_modules=["0"], **fields))
                for name, fields in models.WARA.items()
            }
            layers["WaRA haar L1 by ptwt"] = models.NaiveWaRA(base)
            found = {name: saved_bytes(layer, base.weight, tokens, width) for name, layer in layers.items()}
            for name, count in found.items():
                of_same_rank = found["LoRA r=40" if "L3" in name or "40" in name else "LoRA r=16"]
                results.append(
                    {
                        "variant": name,
                        "width": width,
                        "tokens": tokens,
                        "bytes": count,
                        "to_lora_of_same_rank": round(count / of_same_rank, 4),
                    }
                )
    harness.save(options, {"saved_for_backward": results})
