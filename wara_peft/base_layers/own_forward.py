"""Tells what a layer computes whose forward is not PyTorch's, by calling that forward with random weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .kinds import kind_of, known_kind
from .quantization import FLOATS

TOLERANCE = 0.02
"""Relative error that is allowed. Forwards that compute in bfloat16 inside stay below; a mask or a factor does not."""


def has_own_forward(base: nn.Module) -> bool:
    """Whether a layer may compute something else than PyTorch's class does."""
    # accelerate and diffusers replace a layer's `forward` to load its weights. That does not change what it computes.
    hooked = hasattr(base, "_hf_hook") or hasattr(base, "_diffusers_hook")
    of_kind = getattr(kind_of(base).base_class, "forward", None)
    return type(base).forward is not of_kind or _has_own_call(base) or ("forward" in vars(base) and not hooked)


def _has_own_call(base: nn.Module) -> bool:
    return type(base).__call__ is not nn.Module.__call__


@torch.no_grad()
def is_additive_in_weight(base: nn.Module) -> bool:
    """Whether adding ΔW to the layer's weight adds to its result what an adapter adds: x ΔWᵀ for a linear layer.

    The function calls the layer's forward with a random W and ΔW, in float32, on small and large inputs. The layer
    keeps its own weight, which may be on the meta device.
    """
    weight = cast(Tensor, base.weight)
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)
    one, change = (torch.randn(_shape(base), generator=generator).to(device) for _ in range(2))
    kind = kind_of(base)
    # A forward that clamps or rounds may agree at one scale of inputs, and differ at another.
    for scale in (0.01, 1.0, 100.0):
        for x in kind.inputs(base, scale, generator):
            x = x.to(device)
            before, after = (_result(base, x, weight) for weight in (one, one + change))
            if isinstance(before, Tensor) and isinstance(after, Tensor):
                break
        else:  # the layer takes none of these inputs, so nothing shows that merging is right
            return False
        wanted = kind.product(base, x, change) * _embed_scale(base)
        found = after - before
        if found.shape != wanted.shape or not bool((found - wanted).norm() <= TOLERANCE * wanted.norm()):
            return False
    return True


@torch.no_grad()
def reason_against_adapting(base: nn.Module) -> str | None:
    """Say why an adapter's result cannot be added to a layer's; None if it can, or if no trial is possible.

    Args:
        base: any layer. Only a layer with its own forward, and a weight that is not quantized, is tried.
    """
    weight, kind = base._parameters.get("weight"), known_kind(base)
    if kind is None or type(weight) is not nn.Parameter or weight.dtype not in FLOATS or not has_own_forward(base):
        return None
    if kind.has_vocabulary:
        return _reason_against_embedding(base)
    generator = torch.Generator().manual_seed(0)
    empty = torch.empty(_shape(base), device="meta")  # only shapes matter here, so nothing needs to be computed
    for x in kind.inputs(base, 1.0, generator):
        x = x.to(empty.device)
        found = _result(base, x, empty)
        if isinstance(found, tuple):
            return "its forward returns several values"
        if isinstance(found, Tensor) and found.shape != kind.product(base, x, empty).shape:
            return "its forward pads, or reshapes, so that its result has another shape than the adapter's"
    return None


def _reason_against_embedding(base: nn.Module) -> str | None:
    """Change all rows but those of the tokens. If the result changes, the embedding looks up other rows."""
    weight = torch.zeros(_shape(base))
    (tokens,) = kind_of(base).inputs(base, 1.0, torch.Generator())
    others = torch.ones_like(weight)
    others[tokens.flatten()] = 0
    before, after = (_result(base, tokens, each) for each in (weight, others))
    if isinstance(before, Tensor) and isinstance(after, Tensor) and not torch.equal(before, after):
        return "its forward looks up other rows than those of its input, such as rows of positions"
    return None


def _shape(base: nn.Module) -> tuple[int, ...]:
    """Return the shape of a weight to try. For an embedding one column is enough: it may have many rows."""
    weight = cast(Tensor, base.weight)
    return (len(weight), 1) if kind_of(base).has_vocabulary else tuple(weight.shape)


def _result(base: nn.Module, x: Tensor, weight: Tensor) -> Any:
    """Compute the layer's result with another weight, in eval mode and float32; None if it takes no such input."""
    tensors = {}
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # Values on the meta device are unknown. Ones take their place, except for a trial on that device itself.
        known = tensor.detach() if not tensor.is_meta or weight.is_meta else torch.ones(tensor.shape)
        tensors[name] = known.to(weight.device, dtype)
    tensors["weight"] = weight
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        return functional_call(_Forward(base), {f"base.{name}": tensor for name, tensor in tensors.items()}, (x,))
    except Exception:  # somebody's own forward may ask for further arguments, and raise anything without them
        return None
    finally:
        # `base.train()` would put all submodules into one mode.
        for module, training in modes.items():
            module.training = training


class _Forward(nn.Module):
    """Calls a layer's forward without its hooks, which are the user's and must not see a trial.

    If the layer's class computes in `__call__`, there is no way around the hooks.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Any:
        return self.base(x) if _has_own_call(self.base) else self.base.forward(x)


def _embed_scale(base: nn.Module) -> float:
    """Return the factor by which some embeddings of transformers scale their rows. Adapters apply it as well."""
    scale = getattr(base, "embed_scale", 1.0)
    return 1.0 if isinstance(scale, Tensor) and (scale.is_meta or scale.numel() > 1) else float(scale)
