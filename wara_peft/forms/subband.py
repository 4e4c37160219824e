"""`form="subband"`: a pair of factors for each subband of ΔW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..base_layers.kinds import ModuleShape
from .base import Form, Parts, Settings
from .experts import ExpertsFactor
from .factors import IN_DIM, OUT_DIM, SubbandFactor
from .ordered import OrderedFactor, turns_of


class SubbandForm(Form):
    """ΔW / scaling = Σ_s S_out,s B_s A_s S_in,sᵀ, with a pair of its own for each subband s."""

    name = "subband"
    initialisations: tuple[str, ...] = ("orthogonal", "activation")
    keeps_subbands = True
    own_fields: tuple[str, ...] = ("ordered_dropout", "component_order", "rank_penalty")
    adapts_parameters = True
    factor: type[SubbandFactor] = SubbandFactor

    def check(self, settings: Settings) -> None:
        """Refuse an order or a penalty without `ordered_dropout`, and an order that is none of the subbands."""
        names = turns_of(self.subbands(settings))
        if not settings.ordered_dropout:
            for name in ("component_order", "rank_penalty"):
                if getattr(settings, name):
                    raise ValueError(
                        f"{name}={getattr(settings, name)!r} has no meaning without ordered_dropout=True."
                    )
        elif settings.component_order is not None and sorted(settings.component_order) != sorted(names):
            raise ValueError(
                f"component_order={settings.component_order!r} must name each subband once: {', '.join(names)}."
            )

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
        of_a = (settings.wavelet, settings.levels, in_, ranks, IN_DIM, shape.kernel)
        turns = settings.component_order
        return {
            "wara_A": self.factor(*of_a) if turns is None else OrderedFactor(*of_a, turns=turns),
            "wara_B": self.factor(settings.wavelet, settings.levels, out, ranks, OUT_DIM),
        }

    def initialise(self, parts: Parts, init_weights: bool | str) -> None:
        """As every form, or, with "orthogonal", orthonormal rows of each A_s."""
        super().initialise(parts, init_weights)
        if init_weights == "orthogonal":
            factor_a = parts["wara_A"]
            for name in factor_a.subbands:
                nn.init.orthogonal_(factor_a.subband(name).detach())
