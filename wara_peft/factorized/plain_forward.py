"""Tells linear layers that compute x Wᵀ + b from subclasses that compute something else, by trying their forward."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TOLERANCE = 1e-4
"""Relative error in float32 that is allowed. Rounding stays below; a factor, a mask or a product in bf16 does not."""
IN_FEATURES, OUT_FEATURES = 7, 5
"""Sizes of the trial. As primes they cannot be split into groups of features."""


@torch.no_grad()
def computes_product(layer: nn.Linear | Conv1D) -> bool:
    """Whether a linear layer computes x Wᵀ + b and nothing else, so that a factorised layer may take its place.

    A layer with PyTorch's or transformers' own forward does. A subclass of `nn.Linear` with another forward, such as
    Falcon's, is copied, gets a small random weight, and is called. It counts as another layer if it raises, returns
    something else, or has modules inside.
    """
    # accelerate replaces a layer's `forward` to load its weights. That does not change what it computes.
    if type(layer).__call__ is not nn.Module.__call__ or ("forward" in vars(layer) and not hasattr(layer, "_hf_hook")):
        return False
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(layer, nn.Linear) or layer._modules:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator)
    bias = None if layer.bias is None else torch.randn(OUT_FEATURES, generator=generator)
    trial = copy.copy(layer)
    vars(trial).pop("forward", None)  # a hook of accelerate, bound to the layer itself
    trial._parameters = {**layer._parameters, "weight": nn.Parameter(weight), "bias": _parameter(bias)}
    trial.in_features, trial.out_features, trial.training = IN_FEATURES, OUT_FEATURES, False
    # A forward that clamps or rounds may agree at one scale of inputs, and differ at another.
    for scale in (0.01, 1.0, 100.0):
        for shape in ((2, 3, IN_FEATURES), (3, IN_FEATURES)):
            x = scale * torch.randn(shape, generator=generator)
            wanted = F.linear(x, weight, bias)
            try:
                found = trial.forward(x)
            except Exception:  # somebody's own forward may ask for further arguments, or for other sizes
                return False
            if not isinstance(found, Tensor) or found.shape != wanted.shape or found.is_meta:
                return False
            if not bool((found - wanted).norm() <= TOLERANCE * wanted.norm()):
                return False
    return True


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor)
