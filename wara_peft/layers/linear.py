"""WaRA beside linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..base_layers.kinds import CONV1D, LINEAR
from .base import WaRALayer, add_low_rank


class Linear(WaRALayer, kinds=[LINEAR, CONV1D]):
    """WaRA beside a linear layer: result = base(x) + scaling · (x Âᵀ) B̂ᵀ, for x of shape (..., n).

    Some forms change the hidden channels x Âᵀ before B̂ multiplies them. The base layer is an `nn.Linear`, one of the
    quantized layers that PEFT knows, or transformers' `Conv1D`. ΔW is never built: one `torch.addmm` multiplies by B̂
    and adds to the base layer's result.
    """

    def _add_product(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        module_a, module_b = self.factors(adapter)
        factor_a, factor_b = module_a(), module_b()  # (R, n), (m, R)
        if x.dtype != factor_a.dtype:  # mostly they are equal, and this saves a call in every forward
            x = self._cast_input_dtype(x, factor_a.dtype)
        hidden = F.linear(self.wara_dropout[adapter](x), factor_a)  # (..., R)
        form = self.forms[adapter]
        if not form.has_delta_weight:
            hidden = form.mix_tokens(hidden, self.parts(adapter))
        return add_low_rank(result, hidden, factor_b, self.scaling[adapter])
