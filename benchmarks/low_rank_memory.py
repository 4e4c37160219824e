"""How much memory does training take with low-rank and sparse layers, beside dense and low-rank ones?

    python benchmarks/low_rank_memory.py

Exact bytes of a training step of a Llama-shaped model with AdamW in float32: weights with supports, gradients, the
optimizer's state, and the distinct storages that forward keeps for backward, weights not counted twice. On CUDA
(`--device cuda`) the peak of the allocator over one step too.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from wara_peft.compression import factorize, low_rank_plus_sparse

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK_SHARE, DENSITY = 4, 0.03


def bytes_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Of one training step, the second one, when the optimizer has its state."""
    on_cuda = all(tensor.is_cuda for tensor in batch.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    found = {
        "weights": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "gradients": sum(value.grad.nbytes for value in model.parameters() if value.grad is not None),
        "optimizer": sum(value.nbytes for state in optimizer.state.values() for value in state.values()),
        "saved_for_backward": sum(kept.values()),
    }
    found["all"] = sum(found.values())
    if on_cuda:
        found["peak"] = torch.cuda.max_memory_allocated()
    return found


if __name__ == "__main__":
    options = harness.parser(__doc__, "low_rank_memory", rounds=1).parse_args()
    width, layers, tokens = (32, 2, 16) if options.smoke else (1024, 4, 256)
    config = LlamaConfig(
        vocab_size=128 if options.smoke else 4096,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=8 * width // 3 // 8 * 8,
    )
    rank = width // RANK_SHARE
    variants: dict[str, Callable[[nn.Module], object]] = {
        "dense": lambda model: None,
        f"low-rank r={rank}": lambda model: factorize(model, rank, "random", LAYERS),
        f"low-rank r={rank} + sparse {DENSITY}": lambda model: low_rank_plus_sparse(model, rank, DENSITY, LAYERS),
    }
    results = []
    for name, convert in variants.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        convert(model)
        model.to(options.device).train()
        ids = torch.randint(config.vocab_size, (2, tokens), device=options.device)
        found = bytes_of(model, {"input_ids": ids, "labels": ids})
        results.append({"variant": name, "width": width, "tokens": 2 * tokens, **found})
        del model
    harness.save(options, {"training_step": results})
