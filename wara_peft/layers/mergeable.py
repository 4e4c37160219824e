"""Checks that a base layer with ΔW in its weight computes the same as with the adapter beside it."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..base_layers.own_forward import has_own_forward, is_additive_in_weight
from ..base_layers.quantization import FLOATS


def check_mergeable(module_name: str, base: nn.Module) -> None:
    """Refuse a layer whose weight is no parameter of a float type, or that does more with it than multiply by it.

    Args:
        module_name: the layer's full name.
        base: the layer. Layers that PEFT's quantization backends know are not for this check.

    Raises:
        ValueError: ΔW cannot be merged into this layer.
    """
    # Weights that are parametrized, or made by a hook, are attributes but no registered parameters.
    weight = base._parameters.get("weight")
    reason, remedy = None, "Serve the adapter unmerged"
    if weight is None:
        reason = "its weight is computed from other tensors, so that what is written to it is lost"
        if is_parametrized(base) or base._forward_pre_hooks:  # PEFT's wrapper of trained tokens has neither
            remedy += (
                ", or take off what computes it (`torch.nn.utils.parametrize.remove_parametrizations(module, "
                "'weight')`, `torch.nn.utils.remove_weight_norm(module)`) and put the saved adapter beside the plain "
                "weight"
            )
    elif weight.dtype not in FLOATS:
        reason = f"its weight is quantized, to {weight.dtype}"
        remedy += ", or merge it into the model that is not quantized"
    elif getattr(base, "max_norm", None) is not None:
        reason = f"with max_norm={base.max_norm} it scales down its weight's rows, and would scale ΔW with them"
    elif has_own_forward(base) and not is_additive_in_weight(base):
        reason = (
            f"the forward of its class, {type(base).__name__}, makes something else of a sum of weights than the sum "
            "of results"
        )
    if reason is not None:
        raise ValueError(f"Cannot merge into module {module_name!r}: {reason}. {remedy}.")
