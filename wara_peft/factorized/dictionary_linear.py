"""A linear layer as a dictionary and sparse coefficients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class DictionaryLinear(nn.Module):
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
        super().__init__()
        if not 1 <= nonzeros <= atoms:
            raise ValueError(f"nonzeros={nonzeros} must be between 1 and atoms={atoms}.")
        self.in_features, self.out_features = in_features, out_features
        self.atoms, self.nonzeros = atoms, nonzeros
        self.down = nn.Linear(in_features, atoms, bias=False, device=device, dtype=dtype)
        self.values = nn.Parameter(torch.zeros(out_features, nonzeros, device=device, dtype=dtype))
        places = torch.arange(atoms, device=device) < nonzeros
        self.register_buffer("support", packed(places.expand(out_features, atoms)))
        self.support: Tensor
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def coefficients(self) -> Tensor:
        """C, dense."""
        places = unpacked(self.support, self.atoms)
        return self.values.new_zeros(places.shape).masked_scatter(places, self.values)

    @property
    def weight(self) -> Tensor:
        """The product C D, (m, n)."""
        return self.coefficients @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        return functional.linear(self.down(x), self.coefficients, self.bias)

    def extra_repr(self) -> str:
        return f"atoms={self.atoms}, nonzeros={self.nonzeros}"


def packed(places: Tensor) -> Tensor:
    """Booleans (m, k) as bits, (m, ⌈k/8⌉) bytes."""
    rows = functional.pad(places.to(torch.uint8), (0, -places.shape[1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=places.device)
    return (rows.view(len(rows), -1, 8) * weights).sum(2, dtype=torch.uint8)


def unpacked(support: Tensor, atoms: int) -> Tensor:
    """The booleans, (m, k), again."""
    bits = support[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=support.device)
    return (bits & 1).bool().flatten(1)[:, :atoms]
