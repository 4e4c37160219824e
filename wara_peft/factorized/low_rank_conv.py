"""Convolutions as two smaller ones: from channels to few and back, or along one axis and then along the other."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .base import DownThenUp, in_place_of, svd_factors

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Scheme = Literal["channel", "spatial"]


def checked_conv(module: nn.Module) -> Convolution:
    """The layer itself, if it is a convolution that can be factorised.

    Raises:
        TypeError: not a convolution.
        ValueError: it has groups, a weight that is no plain parameter, or a forward of its own; the message tells of
            the layer as "it".
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
    if type(module).forward not in [kind.forward for kind in CONVOLUTIONS]:
        raise ValueError(f"{type(module).__name__} has a forward of its own. Leave it out.")
    return module


def unfolded(weight: Tensor, scheme: Scheme = "channel") -> Tensor:
    """The weight (m, n, *kernel) as the matrix of which a scheme takes a rank.

    "channel": (m, n · kernel); "spatial", of two-dimensional kernels: (n · height, m · width).
    """
    if scheme == "channel":
        return weight.flatten(1)
    return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def folded(matrix: Tensor, shape: torch.Size, scheme: Scheme = "channel") -> Tensor:
    """The weight again, of that shape (m, n, *kernel)."""
    if scheme == "channel":
        return matrix.view(shape)
    m, n, height, width = shape
    return matrix.view(n, height, m, width).permute(2, 0, 1, 3).contiguous()


class LowRankConv(DownThenUp):
    """A convolution to r channels, then one of kernel size 1: rank r of the weight as a matrix (m, n · kernel).

    Args:
        like: a convolution whose sizes, stride, padding, device and dtype are taken; its values are not.
        rank: r, at most min(m, n · kernel).

    Attributes:
        down: n channels to r, with the kernel, stride and padding; no bias.
        up: r channels to m, with the bias.

    Raises:
        ValueError: a rank out of its range.
    """

    def __init__(self, like: Convolution, rank: int) -> None:
        super().__init__()
        most = min(like.out_channels, like.weight[0].numel())
        if not 1 <= rank <= most:
            raise ValueError(f"rank={rank} of a convolution of weight {tuple(like.weight.shape)} must be 1 to {most}.")
        self.rank = rank
        self.shape = like.weight.shape
        self.down = _conv(like, like.in_channels, rank, like.kernel_size, bias=False)
        one = (1,) * len(like.kernel_size)
        self.up = _conv(like, rank, like.out_channels, one, like.bias is not None, one, (0,) * len(one), one)

    @property
    def weight(self) -> Tensor:
        """The weight of the one convolution, `(m, n, *kernel)`."""
        product: Tensor = self.up.weight.flatten(1) @ self.down.weight.flatten(1)
        return product.view(self.shape)

    @torch.no_grad()
    def dense(self) -> Convolution:
        """The one convolution; the layer itself stays as it is."""
        conv = _conv(
            self.down, self.down.in_channels, self.up.out_channels, self.down.kernel_size, self.bias is not None
        )
        return _filled(conv, self.weight, self.bias, self.training)


class SpatialLowRankConv2d(nn.Module):
    """A convolution along the height, then one along the width: rank r of the weight as (n · height, m · width).

    Args:
        like: an `nn.Conv2d` with zero padding whose sizes, stride, padding, device and dtype are taken.
        rank: r.

    Attributes:
        vertical: n channels to r, kernel (height, 1), no bias.
        horizontal: r channels to m, kernel (1, width), with the bias.

    Raises:
        ValueError: a rank out of its range, or no two-dimensional convolution with zero padding.
    """

    sizes = ("rank",)

    def __init__(self, like: nn.Conv2d, rank: int) -> None:
        super().__init__()
        check_spatial(like)
        height, width = like.kernel_size
        most = min(like.in_channels * height, like.out_channels * width)
        if not 1 <= rank <= most:
            raise ValueError(f"rank={rank} of a convolution of weight {tuple(like.weight.shape)} must be 1 to {most}.")
        self.rank = rank
        padding = like.padding if isinstance(like.padding, tuple) else None
        first, second = ("same", "same") if padding is None else ((padding[0], 0), (0, padding[1]))
        if like.padding == "valid":
            first = second = (0, 0)
        strides, dilations = like.stride, like.dilation
        self.vertical = _conv(
            like, like.in_channels, rank, (height, 1), False, (strides[0], 1), first, (dilations[0], 1)
        )
        self.horizontal = _conv(
            like,
            rank,
            like.out_channels,
            (1, width),
            like.bias is not None,
            (1, strides[1]),
            second,
            (1, dilations[1]),
        )

    @property
    def weight(self) -> Tensor:
        """The weight of the one convolution, (m, n, height, width)."""
        return torch.einsum("mrw,rnh->mnhw", self.horizontal.weight[:, :, 0], self.vertical.weight[..., 0])

    @property
    def bias(self) -> Tensor | None:
        return self.horizontal.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map as the one convolution does."""
        result: Tensor = self.horizontal(self.vertical(x))
        return result

    @torch.no_grad()
    def dense(self) -> Convolution:
        """The one convolution; the layer itself stays as it is."""
        first, second = self.vertical, self.horizontal

        def joined(name: str) -> Any:
            one, other = getattr(first, name), getattr(second, name)
            return one if isinstance(one, str) else (one[0], other[1])

        conv = _conv(
            first,
            first.in_channels,
            second.out_channels,
            joined("kernel_size"),
            self.bias is not None,
            joined("stride"),
            joined("padding"),
            joined("dilation"),
        )
        return _filled(conv, self.weight, self.bias, self.training)

    @torch.no_grad()
    def set_matrices(self, up: Tensor, down: Tensor) -> None:
        """Set factors (n · height, r) and (r, m · width)."""
        vertical, horizontal = self.vertical.weight, self.horizontal.weight
        vertical.copy_(up.view(vertical.shape[1], vertical.shape[2], -1).permute(2, 0, 1)[..., None])
        horizontal.copy_(down.view(-1, len(horizontal), horizontal.shape[3]).transpose(0, 1)[:, :, None])


def check_spatial(module: Convolution) -> None:
    """Refuse a convolution that two one-dimensional ones do not make up.

    Raises:
        ValueError: it has not two axes, or pads with something other than zeros.
    """
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        raise ValueError(
            f"scheme='spatial' is for nn.Conv2d with padding_mode='zeros', not {type(module).__name__} with "
            f"{module.padding_mode!r}. Use scheme='channel'."
        )


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
        # Padding that is not of zeros is done by the convolution that has the kernel.
        padding_mode="zeros" if kernel == (1,) * len(kernel) else like.padding_mode,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
    return made.train(like.training)


def _filled(conv: Convolution, weight: Tensor, bias: Tensor | None, training: bool) -> Convolution:
    conv.weight.copy_(weight)
    if bias is not None and conv.bias is not None:
        conv.bias.copy_(bias)
    return conv.train(training)


@torch.no_grad()
def factorize_conv(module: nn.Module, rank: int, scheme: Scheme = "channel") -> LowRankConv | SpatialLowRankConv2d:
    """Two convolutions for one, by the truncated SVD of its unfolded weight; the module itself stays as it is.

    ‖W − W_r‖²_F = Σ_{i>r} σ_i² of the unfolded weight, with √σ in each factor. The bias is kept.

    Raises:
        TypeError: not a convolution.
        ValueError: a wrong rank, groups, or a weight that is no plain parameter.
    """
    conv = checked_conv(module)
    made = LowRankConv(conv, rank) if scheme == "channel" else SpatialLowRankConv2d(cast(nn.Conv2d, conv), rank)
    made.set_matrices(*svd_factors(unfolded(conv.weight, scheme), rank))
    return in_place_of(conv, made)
