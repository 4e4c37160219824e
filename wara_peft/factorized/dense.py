"""Dense layers out of factorised ones."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from .low_rank_conv import Convolution, LowRankConv


class Factorized(Protocol):
    """What every factorised linear layer has: sizes, and the weight (m, n) and bias (m,) that it stands for."""

    in_features: int
    out_features: int
    training: bool

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


def dense_layer(layer: Factorized | LowRankConv) -> nn.Linear | Convolution:
    """The linear layer or convolution of the same weight and bias; the layer itself stays as it is."""
    return layer.dense() if isinstance(layer, LowRankConv) else dense_linear(layer)


@torch.no_grad()
def dense_linear(layer: Factorized) -> nn.Linear:
    """`nn.Linear` of the same weight and bias, device, dtype and mode; the layer itself stays as it is."""
    weight, bias = layer.weight, layer.bias
    linear = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear.train(layer.training)
