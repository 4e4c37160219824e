"""Low-rank layers whose components have an order: the first b of them are the layer at rank b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .low_rank_conv import LowRankConv
from .low_rank_linear import LowRankLinear
from .resizing import set_values


class _Ordered(nn.Module):
    """What both have: components that are left out in a training forward, and cut for good.

    Attributes:
        limit: in training mode the first so many components count alone; None is all. In evaluation mode all count.
    """

    down: Any
    up: Any
    rank: int
    limit: int | None = None

    def _kept(self) -> int | None:
        return self.limit if self.training else None

    def _resize(self, rank: int) -> None:
        """Be of another rank, without values, with the same parameters."""
        for parameter, dim in ((self.down.weight, 0), (self.up.weight, 1)):
            shape = list(parameter.shape)
            shape[dim] = rank
            set_values(parameter, parameter.data.new_empty(shape))
        self._resized(rank)

    @torch.no_grad()
    def cut(self, rank: int) -> None:
        """Keep the first components alone, in place, in the same parameters; a rank of more than there are keeps all.

        Raises:
            ValueError: the rank is less than 1.
        """
        if rank < 1:
            raise ValueError(f"rank={rank!r} must be at least 1.")
        if rank < self.rank:
            for parameter, dim in ((self.down.weight, 0), (self.up.weight, 1)):
                set_values(parameter, parameter.data.narrow(dim, 0, rank).clone())
            self._resized(rank)

    def settle(self) -> None:
        """Become the plain layer that it is in evaluation mode, with the same parameters."""
        self.__dict__.pop("limit", None)
        kind: Any = LowRankLinear if isinstance(self, LowRankLinear) else LowRankConv
        self.__class__ = kind

    def _resized(self, rank: int) -> None:
        self.rank = rank
        self.limit = None
        is_linear = isinstance(self.down, nn.Linear)
        setattr(self.down, "out_features" if is_linear else "out_channels", rank)
        setattr(self.up, "in_features" if is_linear else "in_channels", rank)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A checkpoint's rank is what it had come to.
        down = state_dict.get(f"{prefix}down.weight")
        if isinstance(down, Tensor) and down.dim() == self.down.weight.dim() and len(down) != self.rank:
            self._resize(len(down))
        super()._load_from_state_dict(state_dict, prefix, *args)


class OrderedLowRankLinear(_Ordered, LowRankLinear):
    """`LowRankLinear` whose first b components are the layer at rank b: y = U[:, :b] (V[:b] x) + b.

    Trained with ordered dropout (see `compression.OrderedRankTraining`) it can be cut to any rank without a
    decomposition. `load_state_dict` takes any rank. After Horváth et al., "Maestro", arXiv 2308.14929.
    """

    def forward(self, x: Tensor) -> Tensor:
        kept = self._kept()
        if kept is None:
            return super().forward(x)
        hidden = functional.linear(x, self.down.weight[:kept])
        return functional.linear(hidden, self.up.weight[:, :kept], self.up.bias)


class OrderedLowRankConv(_Ordered, LowRankConv):
    """`LowRankConv` whose first b channels between its two convolutions are the layer at rank b.

    As `OrderedLowRankLinear`, of the weight as a matrix (m, n · kernel).
    """

    def forward(self, x: Tensor) -> Tensor:
        kept = self._kept()
        if kept is None:
            return super().forward(x)
        hidden = self.down._conv_forward(x, self.down.weight[:kept], None)
        result: Tensor = self.up._conv_forward(hidden, self.up.weight[:, :kept], self.up.bias)
        return result
