"""Measure what a reparametrised LoRA costs beside plain LoRA and the native adapter.

    python benchmarks/reparametrized.py

LoRA r=16, the same reparametrised (Haar, one level), and the native WaRA of r=4, which has R = 16 too. Counted: what
trains, with gradients and AdamW's state; operations that one Linear adds to forward and backward, as in `launches.py`;
bytes saved for backward, as in `memory.py`, less what are parameters of LoRA. Timed, in turns: a training step of one
decoder layer with 512 tokens at each width; one token inside and outside of `frozen_factors`; `generate` of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import harness
import memory
import models
import torch
from decode import generated, one_token
from launches import Operations
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from wara_peft import WaRAConfig, frozen_factors, reparametrize_lora

LORA, INSIDE, NATIVE = "LoRA r=16", "LoRA r=16, reparametrised", "WaRA r=4"
WIDTHS = (256, 384, 768, 1536)


def config(name: str, targets: list[str], **fields: Any) -> PeftConfig:
    """The config of a variant, whose name begins with the method and r."""
    method, _, rank = name.partition(",")[0].partition(" r=")
    if method == "WaRA":
        return WaRAConfig(r=int(rank), target_modules=targets, **fields)
    return LoraConfig(r=int(rank), lora_alpha=int(rank), target_modules=targets, **fields)


def adapted(name: str, base: nn.Module, targets: list[str], **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(base, config(name, targets, **fields))
    if name == INSIDE:
        reparametrize_lora(model)
    return model


def one_layer(name: str | None, width: int) -> nn.Module:
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    return base if name is None else adapted(name, nn.Sequential(base), ["0"]).base_model.model[0]


def operations(name: str | None, width: int) -> int:
    """Operations of a warm forward and backward, as `launches.launches` counts them on the CPU."""
    layer, x = one_layer(name, width), torch.ones(8, width, requires_grad=True)

    def step() -> None:
        layer(x).backward(torch.ones(8, width))

    for _ in range(2):
        step()
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
    with Operations() as counted:
        step()
    return counted.names.total()


def counts(width: int) -> list[dict[str, Any]]:
    """Count trained parameters, operations and saved bytes of one layer, for each variant."""
    bare = operations(None, width)
    found = []
    for name in (LORA, INSIDE, NATIVE):
        layer = one_layer(name, width)
        trained = models.trained_parameters(layer)
        base = layer.get_base_layer().weight
        parameters = sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad)
        # LoRA keeps its parameters, which are there anyway; Â and B̂ are made for the step.
        kept = memory.saved_bytes(layer, base, 512, width) - (parameters if name == LORA else 0)
        found.append(
            {
                "variant": name,
                "width": width,
                "trained": trained,
                "gradients_and_adamw_state": 3 * trained,
                "added_operations": operations(name, width) - bare,
                "bytes_saved_for_backward": kept,
            }
        )
    return found


def steps(width: int, options: Any) -> list[dict[str, Any]]:
    """A whole training step of a decoder with one layer, 4 × 128 tokens."""
    shape = models.decoder(options.smoke, width=width) if width != 768 else models.decoder(options.smoke)
    batch = shape.batch if options.smoke else 512 // shape.tokens
    tokens = torch.randint(1000, (batch, shape.tokens), device=options.device)
    calls = {
        name: models.training_step(adapted(name, shape.build(), shape.targets).to(options.device).train(), tokens)
        for name in (LORA, INSIDE, NATIVE)
    }
    rows = harness.summary(harness.interleaved(calls, options.rounds, device=options.device), LORA)
    return [{"variant": name, "width": width, **row} for name, row in rows.items()]


def decoding(options: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """One token, and `generate`, with unmerged adapters."""
    shape = models.decoder(options.smoke, head=True)
    token = torch.zeros(1, 1, dtype=torch.long, device=options.device)
    prompt = torch.ones(1, 8, dtype=torch.long, device=options.device)
    tokens: dict[str, Callable[[], None]] = {}
    texts: dict[str, Callable[[], None]] = {}
    with ExitStack() as scopes:
        for name in (LORA, INSIDE, NATIVE):
            for frozen in (False, True) if name == INSIDE else (True,):
                model = adapted(name, shape.build(), shape.targets, task_type="CAUSAL_LM").to(options.device).eval()
                key = name if frozen else f"{name}, not frozen"
                tokens[key], texts[key] = one_token(model, token), generated(model, prompt, options.tokens)
                if frozen:
                    scopes.enter_context(frozen_factors(model))
        return {
            "one_token": harness.summary(
                harness.interleaved(tokens, 4 * options.rounds, warmup=5, device=options.device), LORA
            ),
            "generate": harness.summary(
                harness.interleaved(texts, max(options.rounds // 2, 2), device=options.device), LORA
            ),
        }


if __name__ == "__main__":
    parser = harness.parser(__doc__, "reparametrized", rounds=25)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a generate (default: %(default)s)")
    options = parser.parse_args()
    widths = (32,) if options.smoke else WIDTHS
    result: dict[str, Any] = {
        "counted": [row for width in widths for row in counts(width)],
        "training_step": [row for width in widths for row in steps(width, options)],
        "new_tokens": options.tokens,
    }
    harness.save(options, result | decoding(options))
