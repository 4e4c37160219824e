"""Convolutions as two smaller ones: the first goes from all channels to a few, the second from these to all."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..arguments import check_whole_number
from .base import DownThenUp, in_place_of, svd_factors

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def require_conv(module: nn.Module) -> Convolution:
    """The layer itself, if it is a convolution that can be factorised.

    Raises:
        TypeError: the layer is not a convolution.
        ValueError: the layer has groups, a weight that is no plain parameter, or a forward of its own. The message
            calls the layer "it", so that callers can put its name before.
    """
    if not isinstance(module, CONVOLUTIONS):
        raise TypeError(f"{type(module).__name__} is no nn.Conv1d, nn.Conv2d or nn.Conv3d.")
    if module.groups != 1:
        raise ValueError(f"it has groups={module.groups}, and only groups=1 is one matrix. Leave it out.")
    if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
        raise ValueError(
            f"its weight is a {type(module.weight).__name__} of dtype {module.weight.dtype}, quantized or not a plain "
            "parameter. Factorise before you quantize, shard or parametrize, or leave it out."
        )
    # A subclass with its own forward may compute something else with the weight.
    if type(module).forward not in [kind.forward for kind in CONVOLUTIONS]:
        raise ValueError(f"{type(module).__name__} has a forward of its own. Leave it out.")
    return module


class LowRankConv(DownThenUp):
    """A convolution to r channels, and then one of kernel size 1 to m channels.

    Together they are a convolution whose weight, as a matrix (m, n · kernel), has rank r.

    Args:
        like: a convolution that gives sizes, stride, padding, device and dtype. Its values are not used.
        rank: r, at most min(m, n · kernel).

    Attributes:
        down: n channels to r, with the kernel, stride and padding; no bias.
        up: r channels to m, with the bias.

    Raises:
        ValueError: the rank is out of its range.
    """

    def __init__(self, like: Convolution, rank: int) -> None:
        super().__init__()
        most = min(like.out_channels, like.weight[0].numel())
        check_whole_number("rank", rank, most=most, of=f" of a convolution of weight {tuple(like.weight.shape)}")
        self.rank = rank
        self.shape = like.weight.shape
        self.down = _conv(like, like.in_channels, rank, like.kernel_size, bias=False)
        one = (1,) * len(like.kernel_size)
        self.up = _conv(like, rank, like.out_channels, one, like.bias is not None, one, (0,) * len(one), one)

    @property
    def weight(self) -> Tensor:
        """The weight of the one convolution that computes the same, `(m, n, *kernel)`."""
        product: Tensor = self.up.weight.flatten(1) @ self.down.weight.flatten(1)
        return product.view(self.shape)

    @torch.no_grad()
    def dense(self) -> Convolution:
        """The one convolution that computes the same. The layer itself stays as it is."""
        conv = _conv(
            self.down, self.down.in_channels, self.up.out_channels, self.down.kernel_size, self.bias is not None
        )
        conv.weight.copy_(self.weight)
        if conv.bias is not None and self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)


def _conv(
    like: Convolution,
    n: int,
    m: int,
    kernel: tuple[int, ...],
    bias: bool,
    stride: tuple[int, ...] | None = None,
    padding: Any = None,
    dilation: tuple[int, ...] | None = None,
) -> Convolution:
    kind = next(kind for kind in CONVOLUTIONS if isinstance(like, kind))
    made = kind(
        n,
        m,
        cast(Any, kernel),
        cast(Any, like.stride if stride is None else stride),
        cast(Any, like.padding if padding is None else padding),
        cast(Any, like.dilation if dilation is None else dilation),
        bias=bias,
        # The convolution that has the kernel pads. One of kernel size 1 needs no padding.
        padding_mode="zeros" if kernel == (1,) * len(kernel) else like.padding_mode,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
    return made.train(like.training)


@torch.no_grad()
def factorize_conv(module: nn.Module, rank: int) -> LowRankConv:
    """Two convolutions for one, by the truncated SVD of its weight (m, n · kernel). The module stays as it is.

    Each factor takes the roots √σ_i of the r largest singular values, so ‖W − W_r‖²_F = Σ_{i>r} σ_i². The bias stays.

    Raises:
        TypeError: the module is not a convolution.
        ValueError: the rank is out of its range, the module has groups, or its weight is no plain parameter or
            has no SVD.
    """
    conv = require_conv(module)
    made = LowRankConv(conv, rank)
    made.set_matrices(*svd_factors(conv.weight.flatten(1), rank))
    return in_place_of(conv, made)
