"""Compares what a check of the table computes with WaRA inside LoRA to plain LoRA that has the same factors.

The check runs twice. With WaRA inside LoRA it records its outputs, its first gradients and the factors after training;
with plain LoRA it must meet them. Training takes other steps there, so after it plain LoRA takes the recorded factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wara_peft.lora.reparametrized_layers import ReparametrizedLayer

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.002}


@dataclass
class Comparison:
    """Values in the order in which a check computes them.

    Attributes:
        values: what was recorded.
        met: how many of them the second run has met; None during the first.
        adapters: how many LoRAs were reparametrised.
    """

    values: list[Any] = field(default_factory=list)
    met: int | None = None
    adapters: int = 0

    def record_or_next(self, value: Any) -> Any:
        """In the first run keep a value; in the second return the one that stands in its place."""
        if self.met is None:
            self.values.append(value)
            return None
        self.met += 1
        assert self.met <= len(self.values), "plain LoRA computes more values"
        return self.values[self.met - 1]


_current: Comparison | None = None


@contextmanager
def comparing(comparison: Comparison) -> Iterator[None]:
    """Let checks record values, or meet them."""
    global _current
    _current = comparison
    try:
        yield
    finally:
        _current = None


def count_adapter() -> None:
    """Count a LoRA that was reparametrised."""
    if _current is not None:
        _current.adapters += 1


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to the precision of the narrower dtype, as a share of the largest value."""
    tolerance = max(TOLERANCES[found.dtype], TOLERANCES[expected.dtype])
    found, expected = found.detach().double(), expected.detach().double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=0, equal_nan=True)


def meet(value: Tensor) -> None:
    """An output."""
    if _current is not None:
        recorded = _current.record_or_next(value.detach().clone())
        if recorded is not None:
            assert_same(value, recorded)


def meet_gradients(model: nn.Module) -> None:
    """Gradients. That of coefficients is the adjoint of the weight's."""
    if _current is None:
        return
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ReparametrizedLayer)}
    found = {
        name: None if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    recorded = _current.record_or_next((layers, found))
    if recorded is None:
        return
    layers, expected = recorded
    for name, layer in layers.items():
        if f"{name}.weight" in found:
            gradient = found.pop(f"{name}.weight")
            names = [f"{name}.factor.{level}" for level, _ in layer.factor.named_parameters()]
            gradients = [None] * len(names) if gradient is None else layer.gradients(gradient)
            found |= dict(zip(names, gradients, strict=True))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient is None) == (expected[name] is None), name
        if gradient is not None:
            assert_same(gradient, expected[name])


@torch.no_grad()
def take_trained(model: nn.Module) -> None:
    """Go on from the values that WaRA inside LoRA has after training."""
    if _current is None:
        return
    trained = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    recorded = _current.record_or_next({name: value.clone() for name, value in trained.items()})
    if recorded is not None:
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(recorded[name])
