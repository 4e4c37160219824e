"""How long does one token take, in eval mode and unmerged, beside LoRA of the same total rank?

    python benchmarks/decode.py

A forward of one token through the decoder of `models.py`, inside `frozen_factors`, where factors are computed once,
and outside of it, where every forward computes them anew.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import harness
import models
import torch
from peft import LoraConfig
from torch import nn

from wara_peft import WaRAConfig, frozen_factors


def one_token(model: nn.Module, token: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        model(input_ids=token, use_cache=False)

    return run


if __name__ == "__main__":
    options = harness.parser(__doc__, "decode", rounds=101).parse_args()
    shape = models.decoder(options.smoke)
    token = torch.zeros(1, 1, dtype=torch.long, device=options.device)
    variants = {
        "LoRA r=16": LoraConfig(r=16, lora_alpha=16),
        "WaRA haar L1": WaRAConfig(r=4),
        "WaRA db4 L1": WaRAConfig(r=4, wavelet="db4"),
    }
    calls: dict[str, Callable[[], None]] = {}
    scopes = ExitStack()
    for name, config in variants.items():
        config.target_modules = set(shape.targets)
        model = models.adapted(shape, config).to(options.device).eval()
        if name.startswith("WaRA"):
            calls[f"{name}, not frozen"] = one_token(model, token)
            model = models.adapted(shape, config).to(options.device).eval()
            scopes.enter_context(frozen_factors(model))
        calls[name] = one_token(model, token)
    seconds = harness.interleaved(calls, options.rounds, warmup=5, device=options.device)
    scopes.close()
    harness.save(options, {"one_token": harness.summary(seconds, "LoRA r=16")})
