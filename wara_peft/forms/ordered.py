"""Components in an order of importance, so that the first k of them are an adapter of rank k (nested adapters)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..wavelet import Subband, constant_tensors
from .factors import SubbandFactor


def turns_of(bands: Sequence[Subband]) -> list[str]:
    """Names of subbands in the order in which they take turns.

    The whole matrix comes first, then coarse levels before fine ones, and in a level aa and dd before the rest.
    """
    rank = {"aa": 0, "dd": 1, "ad": 2, "da": 3}
    return [band.name for band in sorted(bands, key=lambda band: (band.level > 0, -band.level, rank[band.name[:2]]))]


def importance_order(ranks: Mapping[str, int], turns: Sequence[str]) -> list[int]:
    """Rows of Â, and columns of B̂, the most important first: the first of each subband in turn, then the second, …

    Args:
        ranks: of the subbands, in the order of their rows.
        turns: names of subbands, in the order in which they take turns.
    """
    components = []
    start = 0
    for name, rank in ranks.items():
        components += [(index, turns.index(name), start + index) for index in range(rank)]
        start += rank
    return [row for _, _, row in sorted(components)]


@constant_tensors
def _places(device: torch.device, order: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The place of each row in the order, (R,)."""
    return (torch.tensor(order, device=device).argsort(),)


class OrderedFactor(SubbandFactor):
    """Â, of which a training forward keeps the first b rows in order of importance, with b drawn from 1 … R.

    Args:
        turns: names of subbands in the order in which they take turns.
        others: as in `SubbandFactor`.

    Attributes:
        limit: rows that are kept always, None for all.
    """

    def __init__(self, *others: Any, turns: Sequence[str]) -> None:
        super().__init__(*others)
        self.order = tuple(importance_order(self.ranks, turns))
        self.limit: int | None = None

    def synthesise(self, dtype: torch.dtype | None = None) -> Tensor:
        factor = super().synthesise(dtype)
        return factor if self.limit is None else self._first(factor, self.limit)

    def synthesise_into(self, out: Tensor) -> None:
        super().synthesise_into(out)
        for row in self.order[self.limit :] if self.limit is not None else ():
            out[row].zero_()

    def forward(self, positions: Tensor | None = None) -> Tensor:
        """Return the factor as `SubbandFactor` does, with zeros in the rows that are left out.

        Their number is drawn in training mode, as dropout draws, with gradients or without: reentrant checkpointing
        first runs the forward without gradients, and the forward that it repeats in backward must give the same.
        """
        factor = super().forward(positions)
        if positions is not None and self.limit is not None:
            factor = self._first(factor, self.limit)
        if self.training:
            factor = self._first(factor, torch.randint(1, self.rank + 1, (), device=factor.device))
        return factor

    def set_limit(self, limit: int | None) -> None:
        """Keep the first rows alone, until it is None again."""
        self.limit = None if limit is None or limit >= self.rank else limit
        self.keeping.changed()

    def _first(self, factor: Tensor, number: int | Tensor) -> Tensor:
        (places,) = _places(self.axis.constants, factor, self.order)
        kept = (places < number).to(factor.dtype)
        return factor * kept.view(-1, *[1] * (factor.dim() - 1))
