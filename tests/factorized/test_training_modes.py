"""Every factorised layer under autocast and with gradient checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wara_peft.compression import StraightThroughLinear
from wara_peft.factorized import (
    DenseSparseLinear,
    DictionaryLinear,
    LowRankConv,
    LowRankLinear,
    LowRankPlusSparseLinear,
    OrderedLowRankLinear,
    SharedBaseLinear,
)


def limited(layer: nn.Module) -> nn.Module:
    layer.limit = 2
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "low-rank": lambda: LowRankLinear(8, 6, 3),
    "ordered": lambda: limited(OrderedLowRankLinear(8, 6, 3)),
    "dictionary": lambda: DictionaryLinear(8, 6, 4, 2),
    "low-rank plus sparse": lambda: LowRankPlusSparseLinear(8, 6, 2, 9),
    "dense and sparse": lambda: DenseSparseLinear(8, 6, 3, 4, 2),
    "straight-through": lambda: StraightThroughLinear(
        torch.randn(6, 8), torch.randn(6), DenseSparseLinear(8, 6, 3, 4, 2, False)
    ),
    "shared": lambda: SharedBaseLinear(nn.Parameter(torch.randn(6, 3)), 8),
    "shared, transposed": lambda: SharedBaseLinear(nn.Parameter(torch.randn(8, 3)), 6, transposed=True),
    "convolution": lambda: LowRankConv(nn.Conv2d(8, 6, 3), 3),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer, torch.randn(2, 8, 5, 5) if name == "convolution" else torch.randn(2, 4, 8)


def gradients(layer: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(run(x).float().square().sum(), [x, *parameters]))


@pytest.mark.parametrize("name", LAYERS)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    layer, x = made(name)
    expected = gradients(layer, x, layer)
    assert all(bool(gradient.any()) for gradient in expected)
    for reentrant in (False, True):
        if reentrant:  # which torch.autograd.grad does not go through
            other = copy.deepcopy(layer)
            inputs = x.clone().requires_grad_()
            checkpoint(other, inputs, use_reentrant=True).square().sum().backward()
            found = [inputs.grad, *(value.grad for value in other.parameters() if value.requires_grad)]
        else:
            found = gradients(layer, x, lambda inputs: checkpoint(layer, inputs, use_reentrant=False))
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_and_bfloat16(name: str) -> None:
    layer, x = made(name)
    exact = copy.deepcopy(layer).double()(x.double())
    expected = gradients(layer, x, layer)

    def cast(inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = layer(inputs)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), exact, rtol=0.05, atol=0.05 * float(exact.detach().abs().max()))
        return result

    for found, wanted in zip(gradients(layer, x, cast), expected, strict=True):
        assert found.dtype == torch.float32
        assert float((found - wanted).norm() / wanted.norm()) < 0.05
    lower = copy.deepcopy(layer).bfloat16()
    half = lower(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # A straight-through layer has factorised its rounded weight by now, so its copy has the same factors.
    exact = copy.deepcopy(lower).double()(x.double())
    torch.testing.assert_close(half.double(), exact, rtol=0.05, atol=0.05 * float(exact.detach().abs().max()))
