"""Factorised linear layers against float64 SVDs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from wara_peft.factorized import LowRankLinear, factorize_linear


def linear(kind: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Module:
    layer = Conv1D(17, 11) if kind == "conv1d" else nn.Linear(11, 17, bias)
    nn.init.normal_(layer.weight, std=0.5)
    if bias:
        nn.init.normal_(layer.bias)
    return layer.to(dtype)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
class TestSvd:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("rank", [1, 4, 10])
    def test_error_is_eckart_youngs(self, kind: str, dtype: torch.dtype, rank: int) -> None:
        layer = linear(kind, dtype)
        weight = layer.weight.detach().double().numpy()
        weight = weight.T if kind == "conv1d" else weight
        factorized = factorize_linear(layer, rank)
        product = factorized.up.weight.detach().double().numpy() @ factorized.down.weight.detach().double().numpy()
        least = np.sqrt((np.linalg.svd(weight, compute_uv=False)[rank:] ** 2).sum())
        assert np.linalg.norm(weight - product) == pytest.approx(least, rel=1e-6)
        assert factorized.rank == np.linalg.matrix_rank(product, tol=1e-4) == rank

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_full_rank_reproduces_the_layer(self, kind: str, dtype: torch.dtype, tolerance: float) -> None:
        layer = linear(kind, dtype)
        x = torch.randn(3, 5, 11, dtype=dtype)
        torch.testing.assert_close(factorize_linear(layer, 11)(x), layer(x), rtol=0, atol=tolerance)

    def test_bfloat16(self, kind: str) -> None:
        layer = linear(kind, torch.bfloat16)
        factorized = factorize_linear(layer, 4)
        assert factorized.up.weight.dtype == factorized.up.bias.dtype == torch.bfloat16
        weight = layer.weight.double().T if kind == "conv1d" else layer.weight.double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        expected = left[:, :4] * values[:4] @ right[:4]
        torch.testing.assert_close(factorized.double().weight, expected, rtol=0, atol=0.05)

    def test_the_module_itself_stays_as_it_is(self, kind: str) -> None:
        layer = linear(kind)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        factorized = factorize_linear(layer, 4)
        with torch.no_grad():
            for parameter in factorized.parameters():
                parameter.zero_()
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    def test_random_keeps_the_bias_alone(self, kind: str) -> None:
        layer = linear(kind)
        factorized = factorize_linear(layer, 4, solver="random")
        assert torch.equal(factorized.up.bias, layer.bias)
        svd = factorize_linear(layer, 4)
        assert (factorized.down.weight - svd.down.weight).abs().max() > 1e-3


class TestLayer:
    def test_computes_with_its_product(self) -> None:
        layer = LowRankLinear(11, 17, 4, dtype=torch.float64)
        x = torch.randn(3, 11, dtype=torch.float64)
        assert layer.weight.shape == (17, 11)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

    @pytest.mark.parametrize("bias", [True, False])
    def test_parameter_count(self, bias: bool) -> None:
        layer = LowRankLinear(11, 17, 4, bias)
        assert sum(p.numel() for p in layer.parameters()) == 4 * (11 + 17) + bias * 17
        assert (layer.bias is not None) == bias

    def test_initial_product_has_the_variance_of_a_linear_layers_weight(self) -> None:
        product, dense = LowRankLinear(400, 300, 64), nn.Linear(400, 300)
        assert product.weight.std().item() == pytest.approx(dense.weight.std().item(), rel=0.05)
        assert product.bias.std().item() == pytest.approx(dense.bias.std().item(), rel=0.2)

    @pytest.mark.parametrize(("rank", "expected"), [(1, 1), (0.5, 3), (0.999, 6), (0.001, 1), (1.0, 6)])
    def test_a_fraction_is_of_the_break_even(self, rank: float, expected: int) -> None:
        """Of (17, 11) that is 187 / 28 = 6.68."""
        assert factorize_linear(nn.Linear(11, 17), rank).rank == expected

    def test_trainability_mode_and_missing_bias_are_kept(self) -> None:
        layer = nn.Linear(11, 17, bias=False).requires_grad_(False).eval()
        factorized = factorize_linear(layer, 3)
        assert factorized.bias is None
        assert not factorized.up.training
        assert not any(parameter.requires_grad for parameter in factorized.parameters())


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Packed(nn.Parameter):
    """Stands for a quantizer's own class of parameters."""


def with_weight(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(11, 17)
    layer.weight = weight
    return layer


class TestErrors:
    @pytest.mark.parametrize(
        ("layer", "rank", "message"),
        [
            (nn.Linear(11, 17), 12, r"rank=12 .* 11 inputs and 17 outputs must be an int from 1 to 11"),
            (nn.Linear(11, 17), 0, "rank=0 must be"),
            (nn.Linear(11, 17), -0.5, "rank=-0.5 must be"),
            (nn.Linear(11, 17), float("nan"), "rank=nan must be"),
            (nn.Linear(11, 17, device="meta"), 4, "meta device"),
            (with_weight(nn.Parameter(torch.full((17, 11), torch.nan))), 4, "NaN or infinity"),
            (with_weight(nn.Parameter(torch.zeros(17, 11, dtype=torch.int8), False)), 4, r"torch\.int8, quantized"),
            (with_weight(Packed(torch.zeros(17, 11))), 4, r"Packed of dtype torch\.float32, quantized"),
            (parametrizations.weight_norm(nn.Linear(11, 17)), 4, "parametrize"),
            (Scaled(11, 17), 4, "Scaled has a forward of its own"),
        ],
    )
    def test_values(self, layer: nn.Module, rank: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            factorize_linear(layer, rank)

    def test_bitsandbytes(self) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer = bitsandbytes.nn.Linear4bit(64, 64)
        layer.load_state_dict(nn.Linear(64, 64).state_dict())
        with pytest.raises(ValueError, match=r"Params4bit of dtype .*Factorise before you quantize"):
            factorize_linear(layer.to("cpu"), 4)

    def test_other_modules(self) -> None:
        with pytest.raises(TypeError, match=r"Embedding is not an nn\.Linear or a Conv1D"):
            factorize_linear(nn.Embedding(11, 17), 4)

    def test_solver(self) -> None:
        with pytest.raises(ValueError, match="solver='nmf' is unknown; use one of 'svd', 'random'"):
            factorize_linear(nn.Linear(11, 17), 4, solver="nmf")
