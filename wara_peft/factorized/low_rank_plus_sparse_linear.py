"""A linear layer as the sum of low-rank factors and a sparse matrix. In training it keeps no dense weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..arguments import check_whole_number
from .base import Factorized


class LowRankPlusSparseLinear(Factorized):
    """A linear layer of a low-rank and a sparse part: y = W x + b with W = (α/r) B A + S.

    S has values only in s fixed places, so there are r (m + n) + s weights where W has m n. Forward and backward each
    build W and throw it away: only x, A, B, the values and their places are kept for backward. B starts at zero, so
    that W = S at first. Source: Han et al., "SLTrain", arXiv 2406.02214.

    Args:
        in_features: n.
        out_features: m.
        rank: r, at least 1.
        nonzeros: s, number of values of S; r (m + n) + s must be less than m n.
        alpha: α, a whole number, so that no dtype rounds it.
        bias: whether the layer has a bias b.
        seed: seed with which the places are drawn, uniformly and on the CPU: it gives the same places on every device.
            None takes the first places, for a layer whose places are loaded.
        device, dtype: as in `nn.Linear`.

    Attributes:
        down: A, (r, n).
        up: B, (m, r).
        values: (s,), the values of S.
        indices: (s,), places of the values in the flattened S, in ascending order: int32, or int64 from 2³¹ places on.
            They are saved, since no random generator promises the same places in all its versions.
        alpha: α, int64, of no dimension.

    Raises:
        ValueError: a size is out of its range.
    """

    sizes = ("rank", "nonzeros")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        nonzeros: int,
        alpha: int = 16,
        bias: bool = True,
        seed: int | None = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        places = in_features * out_features
        for name, number in (("rank", rank), ("nonzeros", nonzeros), ("alpha", alpha)):
            check_whole_number(name, number)
        if rank * (in_features + out_features) + nonzeros >= places:
            raise ValueError(
                f"rank={rank} and nonzeros={nonzeros} of a linear layer with {in_features} inputs and {out_features} "
                f"outputs must take fewer weights than the {places} of the dense layer; they take "
                f"{rank * (in_features + out_features) + nonzeros}. Take a lower rank or fewer values."
            )
        self.rank = rank
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(nonzeros, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        kind = torch.int32 if places < 2**31 else torch.int64
        if seed is None:
            indices = torch.arange(nonzeros, device=device, dtype=kind)
        else:
            generator = torch.Generator("cpu").manual_seed(seed)
            drawn = torch.randperm(places, generator=generator, device="cpu")[:nonzeros].sort().values
            indices = drawn.to(device=self.values.device, dtype=kind)
        self.indices: Tensor
        self.register_buffer("indices", indices)
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(alpha, device=self.values.device))
        self.reset_parameters()

    @property
    def nonzeros(self) -> int:
        return len(self.values)

    def reset_parameters(self) -> None:
        """Draw A, the values of S and b from U(±1/√n), as `nn.Linear` draws W. Set B to zero."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """W, (m, n), dense and differentiable. It is for merging and for code that looks at a layer's weight."""
        return _dense(self.down, self.up * self._scaling, self.values, self.indices)

    @property
    def _scaling(self) -> Tensor:
        return self.alpha.to(self.up.dtype) / self.rank

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to (..., m). Under autocast the result has autocast's dtype."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        parts = self.down, self.up, self.values, self.indices
        result: Tensor = _Product.apply(input, *parts, self._scaling)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias.to(result.dtype)

    # Without this check, places that come twice would load and compute without an error: their values would add up.
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        indices = state_dict.get(f"{prefix}indices")
        if isinstance(indices, Tensor) and not indices.is_meta:
            check_places(prefix.rstrip("."), indices, self.nonzeros, self.in_features * self.out_features)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_places(name: str, indices: Tensor, nonzeros: int, places: int) -> None:
    """Refuse places that a layer with these sizes cannot have.

    Raises:
        ValueError: `indices` has another number of places, or places that are out of range, double or out of order.
    """
    if indices.shape != (nonzeros,):
        raise ValueError(
            f"{name!r}: the support has shape {tuple(indices.shape)}, and this layer's has {(nonzeros,)}. Convert the "
            "model with the same density before loading."
        )
    ascending = bool((indices[1:] > indices[:-1]).all())
    if not ascending or int(indices[0]) < 0 or int(indices[-1]) >= places:
        raise ValueError(
            f"{name!r}: the support must be places from 0 to {places - 1} in ascending order. It is broken, or of "
            "another layer."
        )


def _dense(down: Tensor, scaled_up: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    product = scaled_up @ down
    # Each place gets one value at most. So the result is the same in every run, whatever the order of additions.
    return product.flatten().index_add(0, indices, values).view_as(product)


class _Product(torch.autograd.Function):
    """y = x Wᵀ with W = scaling · B A + S. W and its gradient exist for a moment each, and are not saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, values: Tensor, indices: Tensor, scaling: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, down, up, values, indices)
        ctx.scaling = scaling
        # Autocast would compute W itself in half precision; `x` has autocast's dtype already.
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, _dense(down, up * scaling, values, indices).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, values, indices = ctx.saved_tensors
        needs_x, *needs_factors = ctx.needs_input_grad[:4]
        of_x = of_down = of_up = of_values = None
        with torch.autocast(x.device.type, enabled=False):
            scaled_up = up * ctx.scaling
            if needs_x:
                of_x = gradient @ _dense(down, scaled_up, values, indices).to(gradient.dtype)
            if any(needs_factors):
                # the gradient of W, (m, n), over all positions of the batch
                of_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(down.dtype)
                if needs_factors[0]:
                    of_down = scaled_up.T @ of_weight
                if needs_factors[1]:
                    of_up = (of_weight @ down.T) * ctx.scaling
                if needs_factors[2]:
                    of_values = of_weight.flatten().index_select(0, indices)
        return of_x, of_down, of_up, of_values, None, None
