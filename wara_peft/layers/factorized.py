"""Adapters beside layers that keep their weight as a product of smaller matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..base_layers.kinds import FACTORIZED
from ..factorized import DictionaryLinear, LowRankLinear
from .kept_weight import KeptWeight
from .linear import Linear
from .low_rank_update import LowRankUpdate


class FactorizedLinear(Linear, kinds=FACTORIZED):
    """WaRA beside a `LowRankLinear` or a `DictionaryLinear` as a whole: result = base(x) + scaling · (x Âᵀ) B̂ᵀ.

    Merging appends Â and scaling · B̂ to the base layer's factors, as R more units of rank or R more atoms. It builds
    no matrix (m, n). It rounds ΔW to the dtype of the factors, and leaves W exactly as it was.
    """

    @property
    def factorized(self) -> LowRankLinear | DictionaryLinear:
        """The base layer."""
        return cast(LowRankLinear | DictionaryLinear, self.get_base_layer())

    def _check_weight(self) -> None:
        self._check_factors(0)

    def _weights(self) -> list[Tensor]:
        base = self.factorized
        return [base.down.weight.data, (base.up.weight if isinstance(base, LowRankLinear) else base.values).data]

    def _keep_weight(self) -> KeptUnits:
        return KeptUnits(self)

    def _update_to_merge(self, adapter_name: str) -> LowRankUpdate:
        with torch.no_grad():
            return self.low_rank_update(
                adapter_name, torch.promote_types(self.factorized.down.weight.dtype, torch.float32)
            )

    def _add_to_base_weight(self, updates: list[LowRankUpdate], to_check: Sequence[str] = ()) -> None:
        base = self.factorized
        self._check_factors(sum(update.rank for update in updates))
        device = base.down.weight.device
        left = torch.cat([update.factor_b for update in updates], 1)
        right = torch.cat([update.factor_a for update in updates])
        merged = base.appended(left.to(device), right.to(device))
        if to_check and not all(bool(parameter.isfinite().all()) for parameter in merged.parameters()):
            raise self._not_finite(to_check)
        self.set_factorized(merged)

    def _check_factors(self, units: int) -> None:
        """Refuse to merge if that many more units of rank would not leave a factorised layer of the same kind."""
        base = self.factorized
        weight: Tensor = base.down.weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise ValueError(
                f"Cannot merge into module {self.module_name!r}: its factors are quantized or sharded, a "
                f"{type(weight).__name__} of dtype {weight.dtype}. Serve the adapter unmerged, or merge it into the "
                "model as it was before."
            )
        most = min(base.in_features, base.out_features)
        if isinstance(base, LowRankLinear) and base.rank + units > most:
            raise ValueError(
                f"Cannot merge into module {self.module_name!r}: its rank {base.rank} and the adapter's {units} are "
                f"together more than {most}, the most that a layer of {base.in_features} inputs and "
                f"{base.out_features} outputs can have. Serve the adapter unmerged, or leave the layer dense."
            )

    def set_factorized(self, base: nn.Module) -> None:
        """Replace the base layer, which may lie inside of adapter layers of other methods."""
        owner: Any = self
        while isinstance(owner.base_layer, BaseTunerLayer):
            owner = owner.base_layer
        owner.base_layer = base


class KeptUnits(KeptWeight):
    """Keeps how many units of rank, or atoms, a factorised layer has of its own. Merging appends units after them."""

    def __init__(self, layer: FactorizedLinear) -> None:
        self.base: LowRankLinear | DictionaryLinear | None = layer.factorized
        self.units = _units(layer.factorized)
        self.updates, self.seal = {}, None

    def restore(self, layer: FactorizedLinear) -> None:
        base = layer.factorized
        layer.set_factorized(self.base or base.without_last(_units(base) - self.units))

    def to_main_memory(self) -> None:
        """Drop the reference to the base layer: the number of units is enough to restore it."""
        self.base = None

    def cast(self, dtype: torch.dtype) -> None:
        """Do nothing: the layer's own units are still in it, and are cast with it."""


def _units(base: LowRankLinear | DictionaryLinear) -> int:
    return base.rank if isinstance(base, LowRankLinear) else base.atoms
