"""How long does one token take, in eval mode and unmerged, beside LoRA of the same total rank?

    python benchmarks/decode.py

A forward of one token through the decoder of `models.py`, inside `frozen_factors`, where factors are computed once,
and outside of it, where every forward computes them anew; and `generate` of some tokens with no scope, which keeps
them by itself, and checks at every use that their parameters have not changed. What the check costs is measured on the
factors by themselves, beside those that are kept without a check.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import harness
import models
import torch
from peft import LoraConfig
from torch import nn

from wara_peft import WaRAConfig, frozen_factors
from wara_peft.forms import SubbandFactor, factors_of_one_call

VARIANTS = {
    "LoRA r=16": LoraConfig(r=16, lora_alpha=16),
    "WaRA haar L1": WaRAConfig(r=4),
    "WaRA db4 L1": WaRAConfig(r=4, wavelet="db4"),
}


def one_token(model: nn.Module, token: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        model(input_ids=token, use_cache=False)

    return run


def generated(model: nn.Module, prompt: torch.Tensor, tokens: int) -> Callable[[], None]:
    def run() -> None:
        model.generate(input_ids=prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)

    return run


def generation(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """`generate` with no scope around it, in eval mode, and of WaRA in training mode too."""
    shape = models.decoder(options.smoke, head=True)
    prompt = torch.ones(1, 8, dtype=torch.long, device=options.device)
    calls: dict[str, Callable[[], None]] = {}
    for name, config in VARIANTS.items():
        for mode in ("eval", "train") if name.startswith("WaRA") else ("eval",):
            config.target_modules = set(shape.targets)
            config.task_type = "CAUSAL_LM"
            model = models.adapted(shape, config).to(options.device).train(mode == "train")
            calls[name if mode == "eval" else f"{name}, training mode"] = generated(model, prompt, options.tokens)
    rounds = max(options.rounds // 5, 2)
    return harness.summary(harness.interleaved(calls, rounds, device=options.device), "LoRA r=16")


def check(options: argparse.Namespace) -> dict[str, float]:
    """Least microseconds of one use of a kept factor, checked as in `generate`, unchecked as in `frozen_factors`."""
    shape = models.decoder(options.smoke)
    config = WaRAConfig(r=4, target_modules=set(shape.targets))
    checked, frozen = (models.adapted(shape, config).to(options.device).eval() for _ in range(2))
    factors = {
        name: [module for module in model.modules() if isinstance(module, SubbandFactor)]
        for name, model in (("checked", checked), ("unchecked", frozen))
    }
    with torch.no_grad(), factors_of_one_call(checked), frozen_factors(frozen):
        calls = {name: partial(_use, own) for name, own in factors.items()}
        seconds = harness.interleaved(calls, options.rounds, warmup=3)
    uses = USES * len(factors["checked"])
    return {name: round(min(values) * 1e6 / uses, 2) for name, values in seconds.items()}


USES = 20
"""How often a factor is used in a round of `check`."""


def _use(factors: list[SubbandFactor]) -> None:
    for _ in range(USES):
        for factor in factors:
            factor()


if __name__ == "__main__":
    parser = harness.parser(__doc__, "decode", rounds=101)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a generate (default: %(default)s)")
    options = parser.parse_args()
    shape = models.decoder(options.smoke)
    token = torch.zeros(1, 1, dtype=torch.long, device=options.device)
    calls: dict[str, Callable[[], None]] = {}
    scopes = ExitStack()
    for name, config in VARIANTS.items():
        config.target_modules = set(shape.targets)
        model = models.adapted(shape, config).to(options.device).eval()
        if name.startswith("WaRA"):
            calls[f"{name}, not frozen"] = one_token(model, token)
            model = models.adapted(shape, config).to(options.device).eval()
            scopes.enter_context(frozen_factors(model))
        calls[name] = one_token(model, token)
    seconds = harness.interleaved(calls, options.rounds, warmup=5, device=options.device)
    scopes.close()
    result = {"one_token": harness.summary(seconds, "LoRA r=16"), "new_tokens": options.tokens}
    result["microseconds_of_a_kept_factor"] = check(options)
    harness.save(options, result | {"generate": generation(options)})
