"""Budgets of parameters: as many as a given LoRA would have, or a number that shrinks in the course of a training."""

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
    """Count the parameters that a LoRA would have on a model.

    Args:
        model: the base model, or one that has adapters around it.
        like: the LoRA's config.
        modules: base layers by their names in the base model, on which it is counted if it has no `target_modules`.

    Raises:
        ValueError: the LoRA adapts a layer that is not linear, or none at all.
    """
    if like.target_modules is None:
        return lora_parameters(like, modules)
    with plain_model(base_model_of(model)) as plain, _without_adapters(plain):
        # PEFT resolves "all-linear" in place, and the config belongs to the caller.
        like = cast(LoraConfig, _maybe_include_all_linear_layers(copy.deepcopy(like), plain))
        named = dict(plain.named_modules())
    found = {name: module for name, module in named.items() if name and check_target_module_exists(like, name)}
    if not found:
        raise ValueError(f"`like` has target_modules={like.target_modules!r}, which name no module of the model.")
    return lora_parameters(like, found)


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Scope in which the model has its original layers again, in the places where adapter layers stand.

    PEFT's rules for targets read names and classes of modules, and must see those of the base model.
    """
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
    """Give Σ r (m + n) over linear layers, where r is the rank that the LoRA's config gives to each layer's name.

    Raises:
        ValueError: one of the modules is no linear layer.
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
    """A budget that falls from b_0 to b_T along a cubic curve.

        b(t) = b_T + (b_0 − b_T)(1 − (t − t_i) / (T − t_i − t_f))³   for steps t between t_i and T − t_f

    Before t_i it is b_0, and after T − t_f it is b_T.

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
        """The first step at which the budget is `last`."""
        return self.total - self.final

    def at(self, step: int) -> int:
        """Give the budget after `step` steps."""
        if step <= self.warmup:
            return self.first
        if step >= self.end:
            return self.last
        left = 1 - (step - self.warmup) / (self.end - self.warmup)
        return int((self.first - self.last) * left**3 + self.last)
