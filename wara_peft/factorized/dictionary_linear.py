"""A linear layer as a dictionary and sparse coefficients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .sparse_rows import SparseRows, check_nonzeros, pack_bits, unpack_bits


class DictionaryLinear(SparseRows):
    """A linear layer whose weight's rows are sparse combinations of atoms: y = C (D x) + b.

    D, (k, n), is dense, and each row of C, (m, k), has s numbers that are not zero. Their places are kept as bits: on
    disk there are k n + s m numbers and m ⌈k/8⌉ bytes. C is made dense anew in each forward.

    Args:
        in_features: n.
        out_features: m.
        atoms: k.
        nonzeros: s, at most k.
        bias: whether there is b.
        device, dtype: as in `nn.Linear`.

    Attributes:
        down: `nn.Linear(n, k)` without bias, D.
        values: (m, s), what is not zero in C, row by row from left to right.
        support: (m, ⌈k/8⌉) bytes; bit j % 8 of byte j // 8 says whether there is a value in column j.

    Raises:
        ValueError: numbers of atoms or values out of their range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        atoms: int,
        nonzeros: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_nonzeros(nonzeros, atoms)
        super().__init__(in_features, out_features)
        self.atoms, self.nonzeros = atoms, nonzeros
        self.down = nn.Linear(in_features, atoms, bias=False, device=device, dtype=dtype)
        self._add_coefficients(out_features, bias, device, dtype)

    @property
    def weight(self) -> Tensor:
        """The product C D, (m, n)."""
        return self.coefficients @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        return functional.linear(self.down(x), self.coefficients, self.bias)

    def appended(self, left: Tensor, right: Tensor) -> DictionaryLinear:
        """The layer with left · right, (m, R) and (R, n), added to its weight: exactly, as R more atoms.

        Each row then has s + R values. Numbers are new ones, in the dtype of these; the bias is the same parameter.
        """
        down, values = self.down.weight.detach(), self.values.detach()
        places = unpack_bits(self.support, self.atoms)
        everywhere = places.new_ones(left.shape)
        return self._with(
            torch.cat((down, right.to(down))),
            torch.cat((values, left.to(values)), 1),  # row by row, what is new lies to the right of all there is
            torch.cat((places, everywhere), 1),
        )

    def without_last(self, units: int) -> DictionaryLinear:
        """The layer without its last atoms: bit by bit what `appended` was called of."""
        atoms, nonzeros = self.atoms - units, self.nonzeros - units
        return self._with(
            self.down.weight.detach()[:atoms].clone(),
            self.values.detach()[:, :nonzeros].clone(),
            unpack_bits(self.support, self.atoms)[:, :atoms],
        )

    def _with(self, down: Tensor, values: Tensor, places: Tensor) -> DictionaryLinear:
        made = DictionaryLinear(self.in_features, self.out_features, len(down), values.shape[1], False, device="meta")
        made.down.weight = nn.Parameter(down, self.down.weight.requires_grad)
        made.values = nn.Parameter(values, self.values.requires_grad)
        made.support = pack_bits(places)
        made.bias = self.bias
        return made.train(self.training)
