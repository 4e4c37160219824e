"""Layers whose forward is not that of their class in PyTorch; its effect is tried out, with weights made here."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .kinds import kind_of, known_kind
from .quantization import FLOATS

TOLERANCE = 0.02
"""More than a forward is off by that computes in bfloat16 inside, and less than what a mask or a factor does."""


def has_own_forward(base: nn.Module) -> bool:
    """Whether a layer may compute otherwise than PyTorch's class; hooks that load weights replace its forward too."""
    hooked = hasattr(base, "_hf_hook") or hasattr(base, "_diffusers_hook")
    of_kind = getattr(kind_of(base).base_class, "forward", None)
    return type(base).forward is not of_kind or _has_own_call(base) or ("forward" in vars(base) and not hooked)


def _has_own_call(base: nn.Module) -> bool:
    return type(base).__call__ is not nn.Module.__call__


@torch.no_grad()
def is_additive_in_weight(base: nn.Module) -> bool:
    """Whether adding ΔW to the layer's weight adds to its result what an adapter adds: x ΔWᵀ of a linear layer.

    This tries W and ΔW of its own, in float32, on small and large inputs. The layer itself stays as it is, and may be
    on the meta device.
    """
    weight = cast(Tensor, base.weight)
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)
    one, change = (torch.randn(_shape(base), generator=generator).to(device) for _ in range(2))
    kind = kind_of(base)
    for scale in (0.01, 1.0, 100.0):
        for x in kind.inputs(base, scale, generator):
            x = x.to(device)
            before, after = (_result(base, x, weight) for weight in (one, one + change))
            if isinstance(before, Tensor) and isinstance(after, Tensor):
                break
        else:
            return False
        wanted = kind.product(base, x, change) * _embed_scale(base)
        found = after - before
        if found.shape != wanted.shape or not bool((found - wanted).norm() <= TOLERANCE * wanted.norm()):
            return False
    return True


@torch.no_grad()
def reason_against_adapting(base: nn.Module) -> str | None:
    """Why a layer's result cannot have an adapter's added to it; None if it can, or nothing can be told.

    Args:
        base: any layer; only those with a forward of their own, and a weight that is not quantized, are tried.
    """
    weight, kind = base._parameters.get("weight"), known_kind(base)
    if kind is None or type(weight) is not nn.Parameter or weight.dtype not in FLOATS or not has_own_forward(base):
        return None
    if kind.has_vocabulary:
        return _reason_against_embedding(base)
    generator = torch.Generator().manual_seed(0)
    empty = torch.empty(_shape(base), device="meta")
    for x in kind.inputs(base, 1.0, generator):
        x = x.to(empty.device)
        found = _result(base, x, empty)
        if isinstance(found, tuple):
            return "its forward returns several values"
        if isinstance(found, Tensor) and found.shape != kind.product(base, x, empty).shape:
            return "its forward pads, or reshapes, so that its result has another shape than the adapter's"
    return None


def _reason_against_embedding(base: nn.Module) -> str | None:
    """Change the rows of other tokens, and see whether the result changes: then it is made of them."""
    weight = torch.zeros(_shape(base))
    (tokens,) = kind_of(base).inputs(base, 1.0, torch.Generator())
    others = torch.ones_like(weight)
    others[tokens.flatten()] = 0
    before, after = (_result(base, tokens, each) for each in (weight, others))
    if isinstance(before, Tensor) and isinstance(after, Tensor) and not torch.equal(before, after):
        return "its forward looks up other rows than those of its input, such as rows of positions"
    return None


def _shape(base: nn.Module) -> tuple[int, ...]:
    """Shape of a weight to try with; of an embedding one column will do."""
    weight = cast(Tensor, base.weight)
    return (len(weight), 1) if kind_of(base).has_vocabulary else tuple(weight.shape)


def _result(base: nn.Module, x: Tensor, weight: Tensor) -> Any:
    """The layer's result with another weight, in evaluation mode and float32; None where it takes no such input."""
    tensors = {}
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        known = tensor.detach() if not tensor.is_meta or weight.is_meta else torch.ones(tensor.shape)
        tensors[name] = known.to(weight.device, dtype)
    tensors["weight"] = weight
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        return functional_call(_Forward(base), {f"base.{name}": tensor for name, tensor in tensors.items()}, (x,))
    except Exception:  # whatever it asks for that is not given here
        return None
    finally:
        for module, training in modes.items():
            module.training = training


class _Forward(nn.Module):
    """Only a layer's forward: its hooks are the user's, and must not see what is tried here.

    Where its class computes in `__call__`, there is no way around the hooks.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Any:
        return self.base(x) if _has_own_call(self.base) else self.base.forward(x)


def _embed_scale(base: nn.Module) -> float:
    """The factor by which an embedding of transformers scales its rows, and its adapter does too."""
    scale = getattr(base, "embed_scale", 1.0)
    return 1.0 if isinstance(scale, Tensor) and (scale.is_meta or scale.numel() > 1) else float(scale)
