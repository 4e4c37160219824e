"""A linear layer as the product of two smaller ones, and a function that makes it from a linear layer."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arguments import check_whole_number
from .base import DownThenUp, Factorized, in_place_of, svd_factors
from .plain_forward import computes_product

Solver = Literal["svd", "random"]


class LowRankLinear(DownThenUp, Factorized):
    """A linear layer of rank at most r: y = U (V x) + b, with r (m + n) weights where W has m n.

    Args:
        in_features: n.
        out_features: m.
        rank: r, at most min(m, n).
        bias: whether the layer has a bias b.
        device, dtype: as in `nn.Linear`.

    Attributes:
        down: `nn.Linear(n, r)` without bias, whose weight is V.
        up: `nn.Linear(r, m)`, with weight U and bias b.

    Raises:
        ValueError: the rank is out of its range.
        TypeError: the rank is no int.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        of = f" of a linear layer with {in_features} inputs and {out_features} outputs"
        check_whole_number("rank", rank, most=min(in_features, out_features), of=of)
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self, weight_variance: float | None = None) -> None:
        """Draw factors whose product has entries of this variance; None means that of `nn.Linear`, 1/(3n).

        V keeps the variance of its input, and U makes up for the rest. The bias is drawn as in `nn.Linear(n, m)`.
        """
        # An entry of the product is a sum of r products, and U(-a, a) has variance a²/3.
        n = self.in_features
        variance = 1 / (3 * n) if weight_variance is None else weight_variance
        bounds = math.sqrt(3 / n), math.sqrt(3 * variance * n / self.rank)
        for layer, bound in zip((self.down, self.up), bounds, strict=True):
            nn.init.uniform_(layer.weight, -bound, bound)
        if self.up.bias is not None:
            nn.init.uniform_(self.up.bias, -1 / math.sqrt(n), 1 / math.sqrt(n))

    @property
    def weight(self) -> Tensor:
        """The product U V, (m, n).

        Some code looks at a linear layer's weight: PyTorch's own Transformer layers in eval mode, and T5.
        """
        product: Tensor = self.up.weight @ self.down.weight
        return product

    def appended(self, left: Tensor, right: Tensor) -> LowRankLinear:
        """A layer whose weight is this layer's weight + left · right, with `left` (m, R) and `right` (R, n).

        The sum is exact: `left` and `right`, in the dtype of the factors, become R more units of rank. The new layer
        has new factors. Its bias is the same parameter.

        Raises:
            ValueError: r + R is more than min(m, n).
        """
        up, down = self.up.weight.detach(), self.down.weight.detach()
        return self._with(torch.cat((up, left.to(up)), 1), torch.cat((down, right.to(down))))

    def without_last(self, units: int) -> LowRankLinear:
        """The layer without its last `units` of rank. This undoes `appended`, bit by bit."""
        kept = self.rank - units
        return self._with(self.up.weight.detach()[:, :kept].clone(), self.down.weight.detach()[:kept].clone())

    def _with(self, up: Tensor, down: Tensor) -> LowRankLinear:
        # On the meta device no values are drawn that would be thrown away.
        made = LowRankLinear(self.in_features, self.out_features, len(down), bias=False, device="meta")
        made.up.weight = nn.Parameter(up, self.up.weight.requires_grad)
        made.down.weight = nn.Parameter(down, self.down.weight.requires_grad)
        made.up.bias = self.up.bias
        return made.train(self.training)


def resolve_rank(rank: int | float, in_features: int, out_features: int) -> int:
    """The rank as an int. A float is a fraction of the break-even rank m n / (m + n), rounded down to at least 1.

    At the break-even rank the two factors have as many weights as the layer.

    Raises:
        ValueError: the rank is an int below 1, or a float outside of (0, 1].
        TypeError: the rank is neither an int nor a float.
    """
    meaning = "the fraction of the break-even rank m·n/(m+n) of a layer with n inputs and m outputs"
    check_whole_number("rank", rank, fraction=meaning)
    if not isinstance(rank, Integral):
        return max(1, int(rank * in_features * out_features / (in_features + out_features)))
    return int(rank)


def linear_shape(module: nn.Linear | Conv1D | LowRankLinear) -> tuple[int, int]:
    """The numbers of inputs and of outputs, (n, m)."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def check_solver(solver: str) -> None:
    if solver not in get_args(Solver):
        raise ValueError(f"solver={solver!r} is unknown; use one of {', '.join(map(repr, get_args(Solver)))}.")


def require_linear(module: nn.Module) -> nn.Linear | Conv1D:
    """The layer itself, if it is a linear layer that can be factorised.

    Raises:
        TypeError: the layer is not a linear layer.
        ValueError: the weight is quantized or a subclass of tensor, or the layer has a forward of its own that
            computes something else. The message calls the layer "it", so that callers can put its name before.
    """
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise TypeError(f"{type(module).__name__} is not an nn.Linear or a Conv1D, and only these can be factorised.")
    weight = module.weight
    # A quantized or sharded weight is an integer, or a subclass of Parameter or of Tensor, which reports a float.
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise ValueError(
            f"its weight is a {type(weight).__name__} of dtype {weight.dtype}, quantized or not a plain parameter. "
            "Factorise before you quantize, shard or parametrize, or leave the layer out of target_modules."
        )
    if not computes_product(module):
        raise ValueError(
            f"{type(module).__name__} has a forward of its own, which two linear layers would not reproduce. Leave "
            "the layer out of target_modules."
        )
    return module


@torch.no_grad()
def factorize_linear(module: nn.Module, rank: int | float, solver: Solver = "svd") -> LowRankLinear:
    """Return two linear layers for one. The module itself stays as it is.

    "svd" takes the r largest singular values, W_r = (U_r √Σ_r)(√Σ_r V_rᵀ). No matrix of rank r is closer to W in the
    Frobenius norm (Eckart and Young): ‖W − W_r‖²_F = Σ_{i>r} σ_i². The SVD runs in float64. "random" draws factors as
    `LowRankLinear` does, to train from scratch. Both keep the bias.
    Source: Cahyawijaya et al., "Greenformers", arXiv 2108.10808.

    Args:
        module: `nn.Linear`, or transformers' `Conv1D` with its transposed weight.
        rank: r, or a fraction of the break-even m n / (m + n). Ranks at which nothing is
            saved are allowed.
        solver: "svd" or "random".

    Returns:
        The factorised layer, with the device, dtype, mode and `requires_grad` of the module.

    Raises:
        TypeError: the module is not a linear layer, or the rank is no number.
        ValueError: the rank or solver is wrong; the weight is quantized, a subclass of tensor, not loaded or not
            finite; or the module has a forward of its own that computes something else.
    """
    check_solver(solver)
    module = require_linear(module)
    weight = module.weight
    in_features, out_features = linear_shape(module)
    factorized = LowRankLinear(
        in_features,
        out_features,
        resolve_rank(rank, in_features, out_features),
        bias=module.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    if solver == "svd":
        factorized.set_matrices(*svd_factors(weight.T if isinstance(module, Conv1D) else weight, factorized.rank))
    return in_place_of(module, factorized)
