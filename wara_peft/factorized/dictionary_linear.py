"""A linear layer whose weight is sparse coefficients times a dictionary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .sparse_rows import SparseRows, check_nonzeros, pack_bits, unpack_bits


class DictionaryLinear(SparseRows):
    """A linear layer whose weight's rows are sparse combinations of atoms: y = C (D x) + b.

    The atoms are the rows of the dictionary D, (k, n), which is dense. Each row of the coefficients C, (m, k), has s
    numbers that are not zero. Bits keep their places: on disk there are k n + s m numbers and m ⌈k/8⌉ bytes. Each
    forward makes C dense again.

    Args:
        in_features: n.
        out_features: m.
        atoms: k, number of atoms.
        nonzeros: s, number of values in each row of C, at most k.
        bias: whether the layer has a bias b.
        device, dtype: as in `nn.Linear`.

    Attributes:
        down: `nn.Linear(n, k)` without bias, whose weight is D.
        values: (m, s), the values of C, row by row from left to right.
        support: (m, ⌈k/8⌉) bytes; bit j % 8 of byte j // 8 says whether there is a value in column j.

    Raises:
        ValueError: `atoms` or `nonzeros` is out of its range.
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

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        return functional.linear(self.down(input), self.coefficients, self.bias)

    def appended(self, left: Tensor, right: Tensor) -> DictionaryLinear:
        """A layer whose weight is this layer's weight + left · right, with `left` (m, R) and `right` (R, n).

        The sum is exact: `right` becomes R more atoms, and each row of C has s + R values. The new layer has new
        tensors in the dtypes of this layer. Its bias is the same parameter.
        """
        down, values = self.down.weight.detach(), self.values.detach()
        places = unpack_bits(self.support, self.atoms)
        everywhere = places.new_ones(left.shape)
        return self._with(
            torch.cat((down, right.to(down))),
            torch.cat((values, left.to(values)), 1),  # values go from left to right, and the new atoms are the last
            torch.cat((places, everywhere), 1),
        )

    def without_last(self, units: int) -> DictionaryLinear:
        """The layer without its last `units` atoms. This undoes `appended`, bit by bit."""
        atoms, nonzeros = self.atoms - units, self.nonzeros - units
        return self._with(
            self.down.weight.detach()[:atoms].clone(),
            self.values.detach()[:, :nonzeros].clone(),
            unpack_bits(self.support, self.atoms)[:, :atoms],
        )

    def _with(self, down: Tensor, values: Tensor, places: Tensor) -> DictionaryLinear:
        # On the meta device no values are drawn that would be thrown away.
        made = DictionaryLinear(self.in_features, self.out_features, len(down), values.shape[1], False, device="meta")
        made.down.weight = nn.Parameter(down, self.down.weight.requires_grad)
        made.values = nn.Parameter(values, self.values.requires_grad)
        made.support = pack_bits(places)
        made.bias = self.bias
        return made.train(self.training)
