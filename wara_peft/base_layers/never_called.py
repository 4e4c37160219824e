"""Finds layers that their parents never call. A parent reads such a layer's weight, so an adapter has no effect."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from torch import nn

from .refusals import Refusal

_KERNELS = ("causal_conv1d_fn", "causal_conv1d_update")
"""Kernels for which transformers' state space layers read the weights of a depthwise convolution and of `dt_proj`."""

_FIRST_VALUES = ("__init__", "_init_weights", "init_weights", "reset_parameters")
"""Methods that set weights. They name layers too, but do not show how a forward uses these."""

_BEFORE = "_use_nested_tensor_without_adapters"
"""Attribute in which `keep_called` notes the value of `use_nested_tensor` that it replaces."""


def reasons_never_called(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, Refusal]:
    """Say, by name, why an adapter would have no effect in those target modules that are never called.

    There are three sorts. Models like Mamba pass weights to kernels: those of `out_proj` and `conv1d`, which PEFT
    refuses for LoRA as well, and some more. `nn.MultiheadAttention` reads the weight of its `out_proj`. Other parents
    also read only a layer's weight, as WavLM's attention does.

    Args:
        model: the model.
        targets: base layers that are to be adapted, by name.
    """
    found = {name: _reason(model, name, base) for name, base in targets.items()}
    return {
        name: Refusal(f"An adapter would have no effect in target module {{}}: {reason}.")
        for name, reason in found.items()
        if reason is not None
    }


def _own_name(name: str) -> str:
    return name.rpartition(".")[2]


def _reason(model: nn.Module, name: str, base: nn.Module) -> str | None:
    own_name = _own_name(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    parent_class: type = type(parent)
    kind = parent_class.__name__
    if own_name == "out_proj" and type(parent).forward is nn.MultiheadAttention.forward:
        return f"{kind} reads its weight and never calls it; the {kind} as a whole can be a target"
    depthwise = isinstance(base, nn.Conv1d) and base.groups == base.in_channels > 1
    has_kernels = any(hasattr(sys.modules.get(type(parent).__module__), kernel) for kernel in _KERNELS)
    if has_kernels and (depthwise or own_name == "dt_proj"):
        return f"{kind} passes its weight to a kernel and never calls it"
    if isinstance(base, nn.Linear) and _only_reads(parent_class, own_name):
        return f"{kind} reads its weight and never calls it"
    # PEFT's private check raises the error with which it refuses LoRA, whatever the rest of the config.
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, own_name)
    except ValueError:
        return f"the fused kernel of {kind} reads its weight in place of calling it, which PEFT refuses for LoRA too"
    return None


@cache
def _only_reads(parent: type, child: str) -> bool:
    """Whether a class uses the weight of a child in its methods, and neither it nor its file calls that child.

    The source of the class tells: it has `self.q_proj.weight`, and no other use of `self.q_proj`. Nothing is run.
    """
    classes = [cls for cls in parent.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    own = re.escape(child)
    try:
        files = [inspect.getsource(module) for cls in classes if (module := inspect.getmodule(cls)) is not None]
        if not any(re.search(rf"\bself\.{own}\.weight\b", file) for file in files):
            return False  # nearly every class ends here, before the source of each method is read
        methods = [
            inspect.getsource(method)
            for cls in classes
            for name, method in vars(cls).items()
            if inspect.isfunction(method) and name not in _FIRST_VALUES
        ]
    except (OSError, TypeError):  # a class made in an interactive session, or built in, has no source
        return False
    uses = {use for method in methods for use in re.findall(rf"\bself\.{own}\b(\.\w+|)", method)}
    called_by_others = any(re.search(rf"(?<!\bself)\.{own}\(", file) for file in files)
    return ".weight" in uses and uses <= {".weight", ".bias"} and not called_by_others


def keep_called(model: nn.Module) -> None:
    """Make PyTorch's encoder layers call their adapted layers in eval mode too, until `undo_keep_called`.

    In eval mode an `nn.TransformerEncoderLayer` passes all its weights to one fused kernel, unless one of its layers
    has a hook. So adapted layers get an empty hook. An `nn.TransformerEncoder` leaves padding out by nested tensors,
    which only that kernel takes. So nested tensors are switched off, and padded positions are computed as in training
    mode.
    """
    parents = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    adapted = {layer for parent in parents for layer in parent.children() if isinstance(layer, BaseTunerLayer)}
    for layer in adapted:
        if _change_nothing not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_change_nothing)
    for module in model.modules():
        is_new = isinstance(module, nn.TransformerEncoder) and not hasattr(module, _BEFORE)
        if is_new and not adapted.isdisjoint(module.modules()):
            setattr(module, _BEFORE, module.use_nested_tensor)
            module.use_nested_tensor = False  # type: ignore[assignment]  # no stub knows it


def undo_keep_called(model: nn.Module) -> None:
    """Switch nested tensors on again once the adapter layers are gone; their hooks have gone with them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, _BEFORE):
            module.use_nested_tensor = getattr(module, _BEFORE)
            delattr(module, _BEFORE)


def _change_nothing(module: nn.Module, args: Any) -> None:
    """An empty hook: PyTorch skips its fused kernel where a module has a hook."""
