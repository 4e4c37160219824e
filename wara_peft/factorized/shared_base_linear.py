"""A linear layer as a dense base that several layers share, times sparse coefficients of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import Factorized
from .resizing import set_values
from .sparse_rows import pack_bits, scatter_values, unpack_bits


class SharedBaseLinear(Factorized):
    """A linear layer y = U (V x) + b, or, transposed, y = Vᵀ (Uᵀ x) + b, whose base U other layers have too.

    U, (d, r), is one parameter of all of them, to which their gradients add up; V, (r, c), is the layer's own, and has
    values in some places alone. V is made dense anew in each forward.
    Sources: FiPS, arXiv 2411.09816; with dense V and transposed, Basis Sharing, arXiv 2410.03765.

    Args:
        base: U, shared by passing the same parameter to several layers.
        columns: c, the layer's inputs, or, transposed, its outputs.
        transposed: whether d are its inputs in place of its outputs.
        bias: whether there is b.
        group: a number from 1 on, the same for all layers of the base and another one for those of other bases.

    Attributes:
        base: U.
        values: what V has in its places, row by row from left to right; all places at first.
        support: (r, ⌈c/8⌉) bytes; bit j % 8 of byte j // 8 says whether there is a value in column j.
        group: zeros of shape (group, 1 + transposed), by which a checkpoint tells what belongs together: it holds the
            base once.
    """

    _tied_weights_keys: Mapping[str, str] = {}
    """Transformers leaves these out of what it saves."""
    sizes = ("rank", "places", "number", "transposed")

    def __init__(
        self, base: nn.Parameter, columns: int, transposed: bool = False, bias: bool = True, group: int = 1
    ) -> None:
        width, rank = base.shape
        super().__init__(*((width, columns) if transposed else (columns, width)))
        self.base = base
        self.columns, self.transposed = columns, transposed
        self.values = nn.Parameter(base.new_zeros(rank * columns))
        self.support: Tensor
        self.register_buffer("support", pack_bits(torch.ones(rank, columns, dtype=torch.bool, device=base.device)))
        self.group: Tensor
        self.register_buffer("group", torch.zeros(group, 1 + transposed, dtype=torch.uint8, device=base.device))
        self.bias = nn.Parameter(base.new_zeros(self.out_features)) if bias else None

    @property
    def rank(self) -> int:
        return self.base.shape[1]

    @property
    def places(self) -> int:
        """How many values V has."""
        return len(self.values)

    @property
    def number(self) -> int:
        """Of the group."""
        return len(self.group)

    @property
    def coefficients(self) -> Tensor:
        """V, dense."""
        return scatter_values(unpack_bits(self.support, self.columns), self.values)

    @property
    def weight(self) -> Tensor:
        """W, (m, n)."""
        product = self.base @ self.coefficients
        return product.T if self.transposed else product

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        first, second = (self.base.T, self.coefficients.T) if self.transposed else (self.coefficients, self.base)
        return functional.linear(functional.linear(x, first), second, self.bias)

    @torch.no_grad()
    def prune(self, kept: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep some of the values, with the optimizer's moments of them, in place, in the same parameter.

        Args:
            kept: booleans, as many as there are values.
            optimizer: that trains them.
        """
        state = {} if optimizer is None else optimizer.state.get(self.values, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == self.values.shape:
                state[key] = value[kept]
        places = unpack_bits(self.support, self.columns)
        self.support = pack_bits(places.masked_scatter(places, kept))
        set_values(self.values, self.values.data[kept])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A state may have been pruned further, or less.
        values = state_dict.get(f"{prefix}values")
        if isinstance(values, Tensor) and values.dim() == 1 and len(values) != len(self.values):
            set_values(self.values, self.values.data.new_empty(len(values)))
        super()._load_from_state_dict(state_dict, prefix, *args)


def tie_bases(model: nn.Module) -> None:
    """Tell a model of transformers which bases are one parameter, so that it saves each once and ties it again."""
    owners: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SharedBaseLinear):
            owner = owners.setdefault(id(layer.base), name)
            is_owner = owner == name
            layer._tied_weights_keys = {} if is_owner else {"base": "base"}
            if not is_owner:
                ties[f"{name}.base"] = f"{owner}.base"
    known: Any = getattr(model, "all_tied_weights_keys", None)
    if isinstance(known, dict):
        known.update(ties)
