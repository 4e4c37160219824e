"""`form="shared"`: the approximation and the diagonal detail of one level share one pair of factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Settings
from .factors import SubbandFactor
from .subband import SubbandForm


class SharedFactor(SubbandFactor):
    """One side of the pair that `aa1` and `dd1` share: one parameter `level1` of r rows, used twice: R = 2r."""

    def _create_parameters(self) -> None:
        self.level1 = self._empty(len(self.axis.bands[1]) // 2, self.axis.sizes[1])

    def subband(self, name: str) -> Tensor:
        return super().subband("aa1") if name == "dd1" else super().subband(name)

    def coefficients(self) -> list[Tensor | None]:
        return [None, torch.cat((self.level1, self.level1), 1 - self.dim)]


class SharedForm(SubbandForm):
    """ΔW / scaling = S_out,a B A S_in,aᵀ + S_out,d B A S_in,dᵀ. The subbands `ad1` and `da1` are zero."""

    name = "shared"
    initialisations: tuple[str, ...] = ()
    keeps_subbands = False
    adapts_parameters = False
    factor = SharedFactor

    def check(self, settings: Settings) -> None:
        if settings.levels != 1:
            raise ValueError(f"form='shared' has one level, not levels={settings.levels}; form='subband' has any.")

    def single_pair(self, settings: Settings) -> str | None:
        return "form='shared'"

    def ranks(self, settings: Settings, rank: int, chosen: Mapping[str, int]) -> dict[str, int]:
        return {"aa1": rank, "dd1": rank}
