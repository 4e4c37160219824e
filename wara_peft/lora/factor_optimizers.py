"""Refuses PEFT's optimizers that compute with the factors of LoRA, where the parameters are coefficients.

LoRA-FA multiplies the gradient of B by (A Aᵀ)⁻¹, and the Riemannian optimizer those of A and B by (Bᵀ B)⁻¹ and
(A Aᵀ)⁻¹. They take A and B from the parameters, by name. With coefficients in their place they would compute something
else without a word; and (A Aᵀ)⁻¹ mixes components of different bands, so that no coefficients make such a step.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_layers: WeakSet[nn.Module] = WeakSet()
_refusing: list[Any] = []


def refuse_factor_optimizers(layer: nn.Module) -> None:
    """Let these optimizers raise at their first step if they have parameters of this reparametrised layer.

    PEFT makes one of them inside of a function, so that there is no class to ask before an optimizer steps.
    """
    if not _refusing:
        _refusing.append(register_optimizer_step_pre_hook(_refuse))
    _layers.add(layer)


def _refuse(optimizer: Optimizer, *_: Any) -> None:
    is_riemannian = "RiemannianPreconditioned" in type(optimizer).__name__
    # PEFT's optimizers import a part of Trainer, which importing this package must not. Who has one has imported them.
    lorafa = sys.modules.get("peft.optimizers.lorafa")
    if not is_riemannian and (lorafa is None or not isinstance(optimizer, lorafa.LoraFAOptimizer)):
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # A layer that is plain again has parameters of its own.
    layers = [layer for layer in _layers if "factor" in layer._modules]
    found = [layer for layer in layers if any(id(parameter) in stepped for parameter in layer.parameters())]
    if found:
        name = "create_riemannian_optimizer" if is_riemannian else "create_lorafa_optimizer"
        if not is_riemannian:  # which has frozen lora_A when it was made
            named = {str(layer.name): layer for layer in found}
            for layer_name, layer in named.items():
                of_b = named.get(layer_name.replace(".lora_A.", ".lora_B."), layer)
                layer.requires_grad_(any(parameter.requires_grad for parameter in of_b.parameters()))
        raise ValueError(
            f"{name} computes with the factors of LoRA, and {found[0].name!r} is made of coefficients in the "
            "wavelet domain. Nothing has changed. Use another optimizer, such as AdamW or create_loraplus_optimizer, "
            "or take `wara_peft.plain_lora(model)` first."
        )
