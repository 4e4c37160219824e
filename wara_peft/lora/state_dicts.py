"""What a model with reparametrised LoRA does as a whole when its state dict is made or loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .reparametrized_layers import FACTOR, ReparametrizedLayer
from .sharded_coefficients import share_weights


def attend_state_dicts(model: nn.Module) -> None:
    """Let a model check state dicts before it loads them, and make those that `StateDict` describes."""
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is _check_before_loading for hook in hooks):
        model.register_load_state_dict_pre_hook(_check_before_loading)  # type: ignore[no-untyped-call]
        # Hooks of the public method cannot give another dict.
        model._register_state_dict_hook(_with_names_of_frozen)  # type: ignore[no-untyped-call]


class StateDict(OrderedDict[str, Any]):
    """A state dict from which a weight can be removed by the names of its coefficients. Copies are plain dicts.

    `torch.distributed.checkpoint` with `ignore_frozen_params` removes every frozen parameter by its name.

    Attributes:
        removed_by: keys of weights by the names of coefficients.
    """

    removed_by: Mapping[str, str] = {}

    def pop(self, key: str, *default: Any) -> Any:
        if key not in self and key in self.removed_by:
            return super().pop(self.removed_by[key], None)  # which another of its coefficients may have removed
        return super().pop(key, *default)

    def __reduce__(self) -> Any:
        state = {name: value for name, value in vars(self).items() if name != "removed_by"}
        return OrderedDict, (), state, None, iter(self.items())


def _with_names_of_frozen(model: nn.Module, state_dict: Any, prefix: str, _: Any) -> StateDict | None:
    removed_by = {
        f"{prefix}{name}.{FACTOR}.{level}": f"{prefix}{name}.weight"
        for name, layer in _layers(model).items()
        for level, rows in layer.factor.named_parameters()
        if not rows.requires_grad
    }
    if not removed_by:
        return None
    made = StateDict(state_dict)
    # PyTorch's metadata are an attribute. A caller's own dict has none.
    vars(made).update(getattr(state_dict, "__dict__", {}), removed_by=removed_by)
    return made


def _check_before_loading(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state dict before the first module takes its part, if a reparametrised layer cannot take its own."""
    layers = _layers(model)
    first: dict[str, tuple[str, Tensor]] = {}
    for name, layer in layers.items():
        level, rows = next(layer.factor.named_parameters())
        first[f"{prefix}{name}.weight"] = f"{prefix}{name}.{FACTOR}.{level}", rows
    share_weights(state_dict, first)
    for name, layer in layers.items():
        weight = state_dict.get(f"{prefix}{name}.weight")
        if isinstance(weight, Tensor) and not weight.is_meta and not layer.is_placeholder(weight):
            layer.coefficients_of(weight)


def _layers(model: nn.Module) -> dict[str, ReparametrizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ReparametrizedLayer)}
