"""Budgets: the parameters of a LoRA to be like, and how a budget shrinks in the course of a training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from ..base_layers.kinds import kind_of
from ..compiled import plain_model
from ..injection.target_parameters import module_without_adapters
from ..layers.lookup import base_model_of
from ..layers.parameters import AdaptedModule


def lora_parameters_in(model: nn.Module, like: LoraConfig, modules: Mapping[str, nn.Module]) -> int:
    """Count the parameters that a LoRA would have on a model; without `target_modules` it is counted on `modules`.

    Args:
        model: the base model, or one that has adapters around it.
        like: the LoRA's config.
        modules: base layers by their names in the base model.

    Raises:
        ValueError: it adapts what is not linear, or nothing.
    """
    if like.target_modules is None:
        return lora_parameters(like, modules)
    with plain_model(base_model_of(model)) as plain, _without_adapters(plain):
        like = cast(LoraConfig, _maybe_include_all_linear_layers(copy.deepcopy(like), plain))
        named = dict(plain.named_modules())
    found = {name: module for name, module in named.items() if name and check_target_module_exists(like, name)}
    if not found:
        raise ValueError(f"`like` has target_modules={like.target_modules!r}, which name no module of the model.")
    return lora_parameters(like, found)


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Scope in which the layers that adapters have replaced are in their places."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, (BaseTunerLayer, AdaptedModule, AuxiliaryTrainingWrapper))
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = _original(child)
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _original(module: nn.Module) -> nn.Module:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _original(cast(nn.Module, module.original_module))
    return module_without_adapters(module)


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
