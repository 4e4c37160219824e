"""Layers that their parents never call, but whose weights they read: an adapter beside one would have no effect."""

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
"""Functions by which transformers' state space layers pass a depthwise convolution, and beside it `dt_proj`."""

_FIRST_VALUES = ("__init__", "_init_weights", "init_weights", "reset_parameters")
"""Methods that set weights, which says nothing of how these are used."""

_BEFORE = "_use_nested_tensor_without_adapters"


def reasons_never_called(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, Refusal]:
    """Why an adapter would have no effect in those target modules that compute nothing themselves, by name.

    These are `out_proj` and `conv1d` of Mamba's kind of models, as PEFT refuses them for LoRA, with what else their
    kernels are given as a weight, `out_proj` of `nn.MultiheadAttention`, and layers of which their parent only reads
    the weight, as WavLM's attention does.

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
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, own_name)
    except ValueError:
        return f"the fused kernel of {kind} reads its weight in place of calling it, which PEFT refuses for LoRA too"
    return None


@cache
def _only_reads(parent: type, child: str) -> bool:
    """Whether a class uses the weight of a child in its methods, and neither it nor its file calls that child.

    Read off the source of transformers, diffusers and others: `self.q_proj.weight`, and nothing else of `self.q_proj`.
    """
    classes = [cls for cls in parent.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    own = re.escape(child)
    try:
        files = [inspect.getsource(module) for cls in classes if (module := inspect.getmodule(cls)) is not None]
        if not any(re.search(rf"\bself\.{own}\.weight\b", file) for file in files):
            return False  # which is most often so, and known in an instant
        methods = [
            inspect.getsource(method)
            for cls in classes
            for name, method in vars(cls).items()
            if inspect.isfunction(method) and name not in _FIRST_VALUES
        ]
    except (OSError, TypeError):  # it has no source
        return False
    uses = {use for method in methods for use in re.findall(rf"\bself\.{own}\b(\.\w+|)", method)}
    called_by_others = any(re.search(rf"(?<!\bself)\.{own}\(", file) for file in files)
    return ".weight" in uses and uses <= {".weight", ".bias"} and not called_by_others


def keep_called(model: nn.Module) -> None:
    """See to it that PyTorch's encoder layers call their adapted layers in eval mode too, until `undo_keep_called`.

    There an `nn.TransformerEncoderLayer` hands all its weights to one fused kernel, unless one of its layers has a
    hook, and an `nn.TransformerEncoder` leaves padding out by nested tensors, which only that kernel takes.
    Without these padded positions are computed, as in training mode.
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
    """Undo what `keep_called` has done beside adapters' layers, once these are gone."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, _BEFORE):
            module.use_nested_tensor = getattr(module, _BEFORE)
            delattr(module, _BEFORE)


def _change_nothing(module: nn.Module, args: Any) -> None:
    """An empty hook: PyTorch skips its fused kernel where a module has a hook."""
