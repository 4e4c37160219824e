"""`form="subband"`: each subband of ΔW has its own pair of factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..base_layers.kinds import ModuleShape
from .base import Form, Parts, Settings
from .experts import ExpertsFactor
from .factors import IN_DIM, OUT_DIM, SubbandFactor


class SubbandForm(Form):
    """ΔW / scaling = Σ_s S_out,s B_s A_s S_in,sᵀ, with a pair of its own for each subband s."""

    name = "subband"
    initialisations: tuple[str, ...] = ("orthogonal", "activation")
    keeps_subbands = True
    adapts_parameters = True
    factor: type[SubbandFactor] = SubbandFactor

    def create(
        self, settings: Settings, module_name: str, shape: ModuleShape, ranks: Mapping[str, int], context: Any = None
    ) -> Parts:
        out, in_ = shape.lengths
        if shape.experts:
            sides = (("wara_A", in_, IN_DIM), ("wara_B", out, OUT_DIM))
            return {
                part: ExpertsFactor(settings.wavelet, settings.levels, length, ranks, dim, shape.experts)
                for part, length, dim in sides
            }
        return {
            "wara_A": self.factor(settings.wavelet, settings.levels, in_, ranks, IN_DIM, shape.kernel),
            "wara_B": self.factor(settings.wavelet, settings.levels, out, ranks, OUT_DIM),
        }

    def initialise(self, parts: Parts, init_weights: bool | str) -> None:
        """Draw A_s and B_s as other forms do; "orthogonal" then gives each A_s orthonormal rows.

        "activation" needs batches of data, so `training.initialization` sets its values later.
        """
        super().initialise(parts, init_weights)
        if init_weights == "orthogonal":
            factor_a = parts["wara_A"]
            for name in factor_a.subbands:
                nn.init.orthogonal_(factor_a.subband(name).detach())
