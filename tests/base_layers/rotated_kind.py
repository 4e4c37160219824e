"""A kind of layer in one file, as wara_peft/layers/__init__.py would import it in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wara_peft.base_layers.kinds import Kind, ModuleShape, register
from wara_peft.layers.base import WaRALayer, add_low_rank


class RotatedLinear(nn.Module):
    """result = x[..., ::-1] W + b, with W of shape (in, out): no class that PEFT or wara_peft knows."""

    def __init__(self, width: int, depth: int, bias: bool = True) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        self.weight = nn.Parameter(torch.randn(width, depth))
        self.bias = nn.Parameter(torch.randn(depth)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        result = x.flip(-1) @ self.weight
        return result if self.bias is None else result + self.bias


class RotatedKind(Kind):
    def shape(self, base: RotatedLinear) -> ModuleShape:
        return ModuleShape(self, base.depth, base.width)

    def inputs(self, base: RotatedLinear, scale: float, generator: torch.Generator) -> Iterator[Tensor]:
        yield scale * torch.randn(3, base.width, generator=generator)

    def product(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.flip(-1) @ weight


ROTATED = register(RotatedKind("RotatedLinear", RotatedLinear, keeps_in_first=True))


class Rotated(WaRALayer, kinds=[ROTATED]):
    def _add_product(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        factor_a, factor_b = (factor() for factor in self.factors(adapter))
        hidden = self.wara_dropout[adapter](x).flip(-1) @ factor_a.T
        return add_low_rank(result, hidden, factor_b, self.scaling[adapter])
