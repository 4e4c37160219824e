"""A linear layer whose weight is a dense base, which several layers share, times sparse coefficients of its own."""

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
    """A linear layer y = U (V x) + b, or, if transposed, y = Vᵀ (Uᵀ x) + b, whose base U other layers have too.

    U, (d, r), is one parameter of a group of layers, and their gradients add up in it. The coefficients V, (r, c),
    belong to this layer only, and have values only in some places. Each forward makes V dense again.
    Sources: FiPS, arXiv 2411.09816; with dense V and transposed, Basis Sharing, arXiv 2410.03765.

    Args:
        base: U. Layers that get the same parameter share it.
        columns: c, number of the layer's outputs if it is transposed, and otherwise of its inputs.
        transposed: whether d is the number of inputs. Otherwise it is the number of outputs.
        bias: whether the layer has a bias b.
        group: number of the group, from 1 on: the same for all layers of one base, and different for other bases.

    Attributes:
        base: U.
        values: the values of V, row by row from left to right. At first V has a value in every place.
        support: (r, ⌈c/8⌉) bytes; bit j % 8 of byte j // 8 says whether there is a value in column j.
        group: zeros of shape (group, 1 + transposed). A checkpoint holds the base once; the shape of this buffer tells
            which layers have it, and which are transposed.
    """

    _tied_weights_keys: Mapping[str, str] = {}
    """Transformers does not save tensors with these names, as they are tied to others. `tie_bases` sets it."""
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
        """Number of values of V."""
        return len(self.values)

    @property
    def number(self) -> int:
        """Number of the group."""
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

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        first, second = (self.base.T, self.coefficients.T) if self.transposed else (self.coefficients, self.base)
        return functional.linear(functional.linear(input, first), second, self.bias)

    @torch.no_grad()
    def prune(self, kept: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep some of the values and the optimizer's moments of them, in place and in the same parameter.

        Args:
            kept: booleans, one for each value.
            optimizer: the optimizer that trains the values.
        """
        state = {} if optimizer is None else optimizer.state.get(self.values, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == self.values.shape:
                state[key] = value[kept]
        places = unpack_bits(self.support, self.columns)
        self.support = pack_bits(places.masked_scatter(places, kept))
        set_values(self.values, self.values.data[kept])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The layer whose state this is may have been pruned further, or less, than this one.
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
    # transformers collects this mapping when it makes a model, before the layers were replaced.
    known: Any = getattr(model, "all_tied_weights_keys", None)
    if isinstance(known, dict):
        known.update(ties)
