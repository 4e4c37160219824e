"""Layers whose forward is not that of their class in PyTorch; its effect is tried out, with weights made here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .quantization import FLOATS

TRIED = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Classes whose subclasses can be tried."""
_KNOWN = {cls.forward for cls in TRIED}
TOLERANCE = 0.02
"""More than a forward is off by that computes in bfloat16 inside, and less than what a mask or a factor does."""


def has_own_forward(base: nn.Module) -> bool:
    """Whether a layer may compute otherwise than PyTorch's class; hooks that load weights replace its forward too."""
    hooked = hasattr(base, "_hf_hook") or hasattr(base, "_diffusers_hook")
    own_class = type(base).forward not in _KNOWN or _has_own_call(base)
    return own_class or ("forward" in vars(base) and not hooked)


def _has_own_call(base: nn.Module) -> bool:
    return type(base).__call__ is not nn.Module.__call__


@torch.no_grad()
def adds_up(base: nn.Module) -> bool:
    """Whether adding ΔW to the layer's weight adds to its result what an adapter adds: x ΔWᵀ of a linear layer.

    This tries W and ΔW of its own, in float32, on small and large inputs. The layer itself stays as it is, and may be
    on the meta device.
    """
    weight = cast(Tensor, base.weight)
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)
    one, change = (torch.randn(_shape(base), generator=generator).to(device) for _ in range(2))
    for scale in (0.01, 1.0, 100.0):
        for x in _inputs(base, scale, generator, device):
            before, after = (_result(base, x, weight) for weight in (one, one + change))
            if isinstance(before, Tensor) and isinstance(after, Tensor):
                break
        else:
            return False
        wanted = _product(base, x, change) * _embed_scale(base)
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
    weight = base._parameters.get("weight")
    if not isinstance(base, TRIED) or type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
        return None
    if not has_own_forward(base):
        return None
    if isinstance(base, nn.Embedding):
        return _reason_against_embedding(base)
    generator = torch.Generator().manual_seed(0)
    empty = torch.empty(_shape(base), device="meta")
    for x in _inputs(base, 1.0, generator, empty.device):
        found = _result(base, x, empty)
        if isinstance(found, tuple):
            return "its forward returns several values"
        if isinstance(found, Tensor) and found.shape != _product(base, x, empty).shape:
            return "its forward pads, or reshapes, so that its result has another shape than the adapter's"
    return None


def _reason_against_embedding(base: nn.Embedding) -> str | None:
    """Change the rows of other tokens, and see whether the result changes: then it is made of them."""
    weight = torch.zeros(_shape(base))
    (tokens,) = _inputs(base, 1.0, torch.Generator(), weight.device)
    others = torch.ones_like(weight)
    others[tokens.flatten()] = 0
    before, after = (_result(base, tokens, each) for each in (weight, others))
    if isinstance(before, Tensor) and isinstance(after, Tensor) and not torch.equal(before, after):
        return "its forward looks up other rows than those of its input, such as rows of positions"
    return None


def _shape(base: nn.Module) -> tuple[int, ...]:
    """Shape of a weight to try with; of an embedding one column will do."""
    weight = cast(Tensor, base.weight)
    return (len(weight), 1) if isinstance(base, nn.Embedding) else tuple(weight.shape)


def _inputs(base: nn.Module, scale: float, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Inputs to try, of which one has the shape that the layer takes."""
    if isinstance(base, nn.Embedding):
        middle = base.num_embeddings // 2
        yield torch.tensor([[middle, max(middle - 1, 0)]], device=device)
        return
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sizes = zip(base.kernel_size, base.dilation, base.stride, strict=True)
        shapes = [(1, base.in_channels, *(kernel * dilation + 3 * stride for kernel, dilation, stride in sizes))]
    else:
        in_features = int(base.nx if isinstance(base, Conv1D) else cast(nn.Linear, base).in_features)
        shapes = [(1, 3, in_features), (3, in_features)]
    for shape in shapes:
        yield scale * torch.randn(shape, generator=generator).to(device)


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


def _product(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The product that an adapter whose ΔW is `weight` adds to the result."""
    if isinstance(base, nn.Embedding):
        return F.embedding(x, weight)
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return cast(Tensor, base._conv_forward(x, weight, None))
    return x @ weight if isinstance(base, Conv1D) else F.linear(x, weight)


def _embed_scale(base: nn.Module) -> float:
    """The factor by which an embedding of transformers scales its rows, and its adapter does too."""
    scale = getattr(base, "embed_scale", 1.0)
    return 1.0 if isinstance(scale, Tensor) and (scale.is_meta or scale.numel() > 1) else float(scale)
