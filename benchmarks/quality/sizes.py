"""Matching methods by the parameters that they train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from quality.training import Problem, trained_parameters

TOLERANCE = 0.04
"""Gains and singular values are a few numbers beside a pair of LoRA's size; a rank less would be a quarter less."""


def allowance(problem: Problem, budget: float) -> int:
    """The parameters of a budget: so many times those of LoRA with rank 1, and `TOLERANCE` more."""
    return int(budget * adapter_size(problem, LoraConfig(r=1)) * (1 + TOLERANCE))


def adapter_size(problem: Problem, config: PeftConfig) -> int:
    """Parameters of an adapter, without those of the head."""
    return trained_parameters(adapted(problem, config, copy.deepcopy(problem.model)), problem.head)


def adapted(problem: Problem, config: PeftConfig, model: Any = None) -> PeftModel:
    config.target_modules = set(problem.targets)
    config.modules_to_save = problem.head or None
    return get_peft_model(problem.model if model is None else model, config)


def wara_ladder(levels: int, size: int) -> dict[str, int]:
    """Ranks of the subbands after so many steps, each of which gives one more to the next subband.

    Coarse levels come first, and in a level the diagonal before the rest; at one level two steps cost what a rank
    costs LoRA.
    """
    order = [f"aa{levels}"]
    for level in range(levels, 0, -1):
        order += [f"dd{level}", f"ad{level}", f"da{level}"]
    return {name: size // len(order) + (index < size % len(order)) for index, name in enumerate(order)}


def largest(fits: Callable[[int], bool]) -> int:
    """The largest size that fits, of those that fit up to some size; 0 if 1 does not."""
    step, size = 1, 0
    while fits(size + step):
        size += step
        step *= 2
    while step > 1:
        step //= 2
        if fits(size + step):
            size += step
    return size


_sizes: dict[tuple[str, float, int], int] = {}


def largest_size(name: str, size_of: Callable[[int], int], problem: Problem, budget: float) -> int:
    """The largest size within a budget, found once for a method and models of one shape."""
    limit = allowance(problem, budget)
    key = (name, budget, sum(parameter.numel() for parameter in problem.model.parameters()))
    if key not in _sizes:
        _sizes[key] = largest(lambda size: size_of(size) <= limit)
    return _sizes[key]
