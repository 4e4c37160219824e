"""A low-rank layer whose components have an order: the first b of them are the layer at rank b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import check_whole_number
from .low_rank_linear import LowRankLinear
from .resizing import set_values


class OrderedLowRankLinear(LowRankLinear):
    """`LowRankLinear` whose first b components are the layer at rank b: y = U[:, :b] (V[:b] x) + b.

    Trained with ordered dropout (see `compression.OrderedRankTraining`) it can be cut to any rank without a
    decomposition. `load_state_dict` takes any rank. After Horváth et al., "Maestro", arXiv 2308.14929.

    Attributes:
        limit: in training mode the first so many components count alone; None is all. In evaluation mode all count.
    """

    limit: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.limit is None:
            return super().forward(x)
        hidden = functional.linear(x, self.down.weight[: self.limit])
        return functional.linear(hidden, self.up.weight[:, : self.limit], self.up.bias)

    @torch.no_grad()
    def cut(self, rank: int) -> None:
        """Keep the first components alone, in place, in the same parameters; a rank of more than there are keeps all.

        Raises:
            ValueError: the rank is less than 1.
        """
        check_whole_number("rank", rank)
        if rank < self.rank:
            self._set_rank(rank, self.down.weight.data[:rank].clone(), self.up.weight.data[:, :rank].clone())

    def settle(self) -> None:
        """Become the plain layer that it is in evaluation mode, with the same parameters."""
        self.__dict__.pop("limit", None)
        kind: Any = LowRankLinear
        self.__class__ = kind

    def _set_rank(self, rank: int, down: Tensor, up: Tensor) -> None:
        """Be of another rank, with these values in the same parameters."""
        set_values(self.down.get_parameter("weight"), down)
        set_values(self.up.get_parameter("weight"), up)
        self.rank = self.down.out_features = self.up.in_features = rank
        self.limit = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A checkpoint's rank is what it had come to.
        down = state_dict.get(f"{prefix}down.weight")
        if isinstance(down, Tensor) and down.dim() == 2 and len(down) != self.rank:
            rank, like = len(down), self.down.weight.data
            self._set_rank(rank, like.new_empty(rank, self.in_features), like.new_empty(self.out_features, rank))
        super()._load_from_state_dict(state_dict, prefix, *args)
