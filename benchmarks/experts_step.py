"""What does adapting the experts of a mixture cost, beside LoRA: parameters, a training step, and its peak memory?

    python benchmarks/experts_step.py

One decoder layer of Qwen3-MoE, tiny and with 64 experts, of which each token uses some; both of the experts' weights
are adapted, by LoRA (`target_parameters`) with as many parameters as WaRA and with its total rank, and by WaRA, in two
of transformers' implementations of experts. Peak memory is what a forward and backward allocate at most beyond what
was there before, counted allocation by allocation on a CPU, and as the allocator says on a GPU; `weight_bytes` is the
size of the larger of the two weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import harness
import models
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3MoeConfig, Qwen3MoeModel

from wara_peft import WaRAConfig

BASELINE = "LoRA r=8"
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass
class Layer:
    """Sizes of a layer and its input."""

    hidden: int
    intermediate: int
    experts: int
    used: int
    tokens: int

    def build(self, implementation: str) -> Qwen3MoeModel:
        torch.manual_seed(0)
        model = Qwen3MoeModel(
            Qwen3MoeConfig(
                vocab_size=1000,
                num_hidden_layers=1,
                hidden_size=self.hidden,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=self.hidden // 4,
                moe_intermediate_size=self.intermediate,
                num_experts=self.experts,
                num_experts_per_tok=self.used,
            )
        )
        model.set_experts_implementation(implementation)
        return model

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return self.experts * 2 * self.intermediate * self.hidden * dtype.itemsize


def layers(smoke: bool) -> dict[str, Layer]:
    """The tiny one and that of 64 experts."""
    if smoke:
        return {"tiny": Layer(16, 16, 4, 2, 8), "64 experts": Layer(16, 16, 8, 2, 8)}
    return {"tiny": Layer(64, 64, 8, 2, 256), "64 experts": Layer(256, 128, 64, 8, 256)}


def configs() -> dict[str, PeftConfig]:
    """By name; with one level WaRA of rank 4 has as many parameters as LoRA of rank 8, and R = 16."""
    found: dict[str, PeftConfig] = {f"LoRA r={r}": LoraConfig(r=r, lora_alpha=r) for r in (8, 16)}
    found |= {name: WaRAConfig(**fields) for name, fields in models.WARA.items() if name.endswith("L1")}
    for config in found.values():
        config.target_modules, config.target_parameters = [], PARAMETERS
    return found


def peak_bytes(model: nn.Module, tokens: Tensor) -> int:
    """The most that a forward and backward have allocated at a time, beyond what was there before."""

    def run() -> None:
        model(input_ids=tokens).last_hidden_state.square().mean().backward()

    run()
    model.zero_grad()
    if tokens.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(layer: Layer, implementation: str, rounds: int, device: str, dtype: torch.dtype) -> dict[str, object]:
    """All methods on one layer."""
    tokens = torch.randint(1000, (1, layer.tokens), device=device)
    steps: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, object]] = {}
    for name, config in configs().items():
        model = get_peft_model(layer.build(implementation).to(device, dtype), config).train()
        steps[name] = models.training_step(model, tokens)
        rows[name] = {"parameters": models.trained_parameters(model), "peak_bytes": peak_bytes(model, tokens)}
    seconds = harness.interleaved(steps, rounds, device=device)
    for name, row in harness.summary(seconds, BASELINE).items():
        rows[name] |= row
    return rows  # type: ignore[return-value]


if __name__ == "__main__":
    parser = harness.parser(__doc__, "experts_step", rounds=11)
    parser.add_argument("--dtype", default="float32", help="dtype of the models (default: %(default)s)")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    result = {
        name: {
            "sizes": vars(layer),
            "weight_bytes": layer.weight_bytes(dtype),
            **{
                implementation: measure(layer, implementation, rounds, options.device, dtype)
                # a step of LoRA takes seconds where experts are computed one by one
                for implementation, rounds in (("grouped_mm", options.rounds), ("eager", max(3, options.rounds // 3)))
            },
        }
        for name, layer in layers(options.smoke).items()
    }
    harness.save(options, {"dtype": options.dtype, "layers": result})
