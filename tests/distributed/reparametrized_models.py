"""Tiny models with a reparametrised LoRA in float64, and what two processes compare of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
)
from torch.distributed.tensor import DTensor

from tests.references import Mlp
from wara_peft import plain_lora, reparametrize_lora

FULL = StateDictOptions(full_state_dict=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
INPUTS = torch.randn(8, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def plain(seed: int = 0) -> PeftModel:
    """A tiny model with a LoRA as it begins; its base weights are the same for all seeds."""
    torch.manual_seed(100)
    base = Mlp().double()
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=9, target_modules=["up", "down"]))


def made(seed: int = 0) -> PeftModel:
    model = plain(seed)
    reparametrize_lora(model, wavelet="db2")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, processes: int = 2) -> None:
    """Steps on all inputs, of which each process takes its share."""
    share = INPUTS.chunk(processes)[dist.get_rank() if processes > 1 else 0]
    for _ in range(steps):
        (model(share) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def output(model: nn.Module, inputs: Tensor = INPUTS) -> Tensor:
    with torch.no_grad():
        return model(inputs)


def coefficients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "level" in name
    }


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def in_span(seed: int = 3) -> dict[str, Tensor]:
    """Plain weights of another adapter that lies in the same bands."""
    return {key: value for key, value in made(seed).state_dict().items() if "lora_" in key}


def assert_loaded(model: nn.Module, expected: PeftModel) -> None:
    assert_close(output(model), output(expected))
    assert_close(coefficients(model), coefficients(expected))


def plain_lora_of(model: PeftModel) -> PeftModel:
    plain_lora(model)
    return model


def assert_sharded_is_refused(shard: Callable[[PeftModel], Any], inside: Callable[[Any], PeftModel]) -> None:
    """What `shard` gives can be neither made plain nor reparametrised; `inside` gives the model in it."""
    for model, function, words in (
        (shard(made()), plain_lora, "is sharded, so it cannot get a plain weight"),
        (shard(plain()), reparametrize_lora, "reparametrise the model before it is sharded"),
    ):
        before = output(model)
        try:
            function(inside(model))
        except ValueError as error:
            assert words in str(error), error
            assert "base_model.model.up" in str(error), error
        else:
            raise AssertionError(f"{function.__name__} did not refuse")
        assert_close(output(model), before)
