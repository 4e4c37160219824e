"""Budgets: the parameters of a LoRA to be like, and how a budget shrinks in the course of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.other import get_pattern_key
from torch import nn

from ..kinds import kind_of


def lora_parameters(like: LoraConfig, modules: Mapping[str, nn.Module]) -> int:
    """Σ r (m + n) over linear layers, with a LoRA's ranks by name.

    Raises:
        ValueError: one is no linear layer.
    """
    patterns = like.rank_pattern or {}
    total = 0
    for name, module in modules.items():
        if not kind_of(module).is_linear:
            raise ValueError(f"`like` adapts module {name!r}, which is not linear. Give it other targets.")
        rank = patterns.get(get_pattern_key(list(patterns), name), like.r)
        total += rank * sum(length or 0 for length in _get_in_out_features(module))
    return total


@dataclass(frozen=True)
class CubicBudget:
    """b(t) = b_T + (b_0 − b_T)(1 − (t − t_i) / (T − t_i − t_f))³ between steps t_i and T − t_f; constant outside.

    Attributes:
        first, last: b_0 and b_T.
        total, warmup, final: T, t_i and t_f, in steps.

    Source: AdaLoRA, arXiv 2303.10512, equation 11.
    """

    first: int
    last: int
    total: int
    warmup: int
    final: int

    @property
    def end(self) -> int:
        """The step from which on the budget is the last one."""
        return self.total - self.final

    def at(self, step: int) -> int:
        """The budget after that many steps."""
        if step <= self.warmup:
            return self.first
        if step >= self.end:
            return self.last
        left = 1 - (step - self.warmup) / (self.end - self.warmup)
        return int((self.first - self.last) * left**3 + self.last)
