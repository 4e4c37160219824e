"""Adapters beside layers that keep their weight as a product of smaller matrices."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .factorized import DictionaryLinear, LowRankLinear
from .layer import Linear


class FactorizedLinear(Linear):
    """WaRA beside a `LowRankLinear` or a `DictionaryLinear` as a whole: result = base(x) + scaling · (x Âᵀ) B̂ᵀ.

    Merging is exact, and builds no matrix (m, n): Â and scaling · B̂ become R more units of rank, or R more atoms. They
    are rounded to the dtype of the factors, which changes ΔW by its own rounding alone, and not by that of W.
    """

    @property
    def _factorized(self) -> LowRankLinear | DictionaryLinear:
        return cast(LowRankLinear | DictionaryLinear, self.get_base_layer())

    def _base_features(self) -> tuple[int, int]:
        return self._factorized.in_features, self._factorized.out_features

    @torch.no_grad()
    def _add_to_base_weight(self, adapter_names: list[str], sign: int, check_finite: bool) -> None:
        base = self._factorized
        dtype = torch.promote_types(base.down.weight.dtype, torch.float32)
        updates = [self.low_rank_update(name, dtype) for name in adapter_names]
        units = sum(update.rank for update in updates)
        if sign < 0:
            self._set_base_layer(base.without_last(units))
            return
        self._check_factors(units)
        left = torch.cat([update.factor_b for update in updates], 1)
        right = torch.cat([update.factor_a for update in updates])
        merged = base.appended(left, right)
        if check_finite and not all(bool(parameter.isfinite().all()) for parameter in merged.parameters()):
            raise self._not_finite(adapter_names)
        self._set_base_layer(merged)

    def _check_factors(self, units: int) -> None:
        """Refuse to merge where the result would be no factorised layer of its kind."""
        base = self._factorized
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

    def _set_base_layer(self, base: nn.Module) -> None:
        """Put it below what other adapters have put around it."""
        owner: Any = self
        while isinstance(owner.base_layer, BaseTunerLayer):
            owner = owner.base_layer
        owner.base_layer = base
