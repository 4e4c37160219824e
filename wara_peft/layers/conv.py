"""WaRA beside a convolution: the wavelet transform runs along the channels, the kernel's own dimensions stay."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base_layers.kinds import CONVOLUTIONS
from .base import WaRALayer

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Conv(WaRALayer, kinds=CONVOLUTIONS):
    """result = base(x) + scaling · B̂ ∗ (Â ∗ x), with Â of shape (R, in / groups, *kernel) and B̂ of shape (out, R).

    The base layer is an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, whose stride, padding, padding mode and dilation Â
    takes over. B̂ is a convolution with a kernel of one. If there are groups, every group has the same Â and its own
    rows of B̂: ΔW = B̂ Â has the base weight's shape (out, in / groups, *kernel), and means that.
    """

    @property
    def convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())  # `nn.Conv1d` and `nn.Conv3d` have the same attributes

    def _add_product(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        groups, ones = self.convolution.groups, [1] * self.kind.kernel_dimensions
        factor_a, factor_b = (factor() for factor in self.factors(adapter))  # (R, in / groups, *kernel), (out, R)
        x = self.wara_dropout[adapter](self._cast_input_dtype(x, factor_a.dtype))
        # PyTorch's private function applies the layer's padding mode too, which `F.conv2d` does not know.
        hidden = self.convolution._conv_forward(x, factor_a.repeat(groups, 1, *ones), None)
        product = FUNCTIONS[len(ones)](hidden, factor_b.view(*factor_b.shape, *ones), groups=groups)
        return torch.add(result, product, alpha=self.scaling[adapter])
