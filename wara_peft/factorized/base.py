"""Base classes of factorised layers, and functions to make such layers from dense ones."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from .marks import SkipsMark

Made = TypeVar("Made", bound=nn.Module)


class Factorized(SkipsMark):
    """A linear layer whose weight W, (m, n), is made of smaller tensors: y = W x + b.

    Args:
        in_features: n.
        out_features: m.

    Attributes:
        sizes: names of the attributes that give the sizes of these tensors. A saved model lists their values.
    """

    sizes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @property
    def weight(self) -> Tensor:
        """W, (m, n)."""
        raise NotImplementedError

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """`nn.Linear` with the same weight, bias, device, dtype and mode. The layer itself stays as it is."""
        bias = cast(Tensor | None, self.bias)
        # On the meta device, `nn.Linear` draws no values that would be thrown away.
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach().clone(memory_format=torch.contiguous_format))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        sizes = [f"{name}={getattr(self, name)}" for name in ("in_features", "out_features", *self.sizes)]
        return ", ".join([*sizes, f"bias={self.bias is not None}"])


class DownThenUp(SkipsMark):
    """A layer that maps down to r features, or channels, and up again.

    Attributes:
        down: the first layer, without bias.
        up: the second layer, with the bias of both.
        rank: r.
    """

    down: Any
    up: Any
    rank: int
    sizes: ClassVar[tuple[str, ...]] = ("rank",)

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = self.up.bias
        return found

    def forward(self, input: Tensor) -> Tensor:
        """Compute the output of the dense layer that has this weight and bias, (..., n) to (..., m)."""
        result: Tensor = self.up(self.down(input))
        return result

    @torch.no_grad()
    def set_matrices(self, up: Tensor, down: Tensor) -> None:
        """Set the factors (m, r) and (r, n). A convolution has n in channels times places of the kernel."""
        self.up.weight.copy_(up.view_as(self.up.weight))
        self.down.weight.copy_(down.view_as(self.down.weight))


def check_values(weight: Tensor) -> None:
    """Refuse a weight that has no SVD.

    Raises:
        ValueError: the weight is on the meta device, or not finite; the message speaks of a layer as "it".
    """
    if weight.is_meta:
        raise ValueError("its weight is on the meta device, without values. Load the model first, or use 'random'.")
    if not bool(weight.isfinite().all()):
        raise ValueError(
            "its weight holds NaN or infinity, which have no SVD. Load or train the model again, or leave the layer "
            "out."
        )


def svd_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r √Σ_r and √Σ_r V_rᵀ, (m, r) and (r, n), of a matrix U Σ Vᵀ, in float64.

    Raises:
        ValueError: see `check_values`.
    """
    check_values(matrix)
    # In float32 the errors of six encoder layers, at full rank, add up to more than 1e-5.
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


@torch.no_grad()
def in_place_of(module: Any, made: Made) -> Made:
    """Give a new layer the bias, mode and `requires_grad` of the module that it replaces, and return it."""
    bias = cast(nn.Parameter | None, made.bias)
    for parameter in made.parameters():
        parameter.requires_grad_(module.weight.requires_grad)
    if bias is not None:
        bias.copy_(module.bias)
        bias.requires_grad_(module.bias.requires_grad)
    return made.train(module.training)
