"""A low-rank layer whose components have an order: its first b components are a layer of rank b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import check_whole_number
from .low_rank_linear import LowRankLinear
from .resizing import set_values


class OrderedLowRankLinear(LowRankLinear):
    """`LowRankLinear` whose first k components are a layer of rank k: y = U[:, :k] (V[:k] x) + b.

    Component i is column i of U with row i of V. If the layer is trained with ordered dropout, see
    `compression.OrderedRankTraining`, it can be cut to any rank without a decomposition. `load_state_dict` takes a
    state of any rank. Source: Horváth et al., "Maestro", arXiv 2308.14929.

    Attributes:
        limit: number of components that count in training mode, from the first on; None means all. In evaluation mode
            all components count.
    """

    limit: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.limit is None:
            return super().forward(input)
        hidden = functional.linear(input, self.down.weight[: self.limit])
        return functional.linear(hidden, self.up.weight[:, : self.limit], self.up.bias)

    @torch.no_grad()
    def cut(self, rank: int) -> None:
        """Keep only the first `rank` components, in place and in the same parameters. A larger rank keeps all.

        Raises:
            ValueError: the rank is less than 1.
        """
        check_whole_number("rank", rank)
        if rank < self.rank:
            self._set_rank(rank, self.down.weight.data[:rank].clone(), self.up.weight.data[:, :rank].clone())

    def settle(self) -> None:
        """Become a plain `LowRankLinear`, with the same parameters."""
        # The object changes its class, so that whoever holds the module or hooks on it need not be told.
        self.__dict__.pop("limit", None)
        kind: Any = LowRankLinear
        self.__class__ = kind

    def _set_rank(self, rank: int, down: Tensor, up: Tensor) -> None:
        """Change the rank: give the same parameters these values, which have other shapes."""
        set_values(self.down.get_parameter("weight"), down)
        set_values(self.up.get_parameter("weight"), up)
        self.rank = self.down.out_features = self.up.in_features = rank
        self.limit = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A checkpoint that was saved after a cut has a lower rank than a layer as training starts with it.
        down = state_dict.get(f"{prefix}down.weight")
        if isinstance(down, Tensor) and down.dim() == 2 and len(down) != self.rank:
            rank, like = len(down), self.down.weight.data
            self._set_rank(rank, like.new_empty(rank, self.in_features), like.new_empty(self.out_features, rank))
        super()._load_from_state_dict(state_dict, prefix, *args)
