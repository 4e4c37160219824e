"""The layer beside dense autograd in float64, what it keeps for backward, and its support."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wara_peft.factorized import LowRankPlusSparseLinear


def layer_of(bias: bool = True, dtype: torch.dtype = torch.float64) -> LowRankPlusSparseLinear:
    """7 inputs, 9 outputs, rank 2 and 11 values, with a B that is not zero."""
    layer = LowRankPlusSparseLinear(7, 9, 2, 11, alpha=3, bias=bias, seed=5, dtype=dtype)
    nn.init.normal_(layer.up)
    return layer


def dense_of(layer: LowRankPlusSparseLinear) -> Tensor:
    """W by NumPy."""
    up, down, values = (value.detach().double().numpy() for value in (layer.up, layer.down, layer.values))
    weight = 3 / 2 * up @ down
    np.add.at(weight.ravel(), layer.indices.numpy(), values)
    return torch.from_numpy(weight)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_dense_autograd(bias: bool) -> None:
    layer = layer_of(bias)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer.weight, dense_of(layer), rtol=1e-13, atol=1e-13)
    expected = x @ layer.weight.T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn(2, 3, 9, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    assert len(leaves) == 4 + bias
    for found, wanted in zip(
        torch.autograd.grad((layer(x) * upstream).sum(), leaves),
        torch.autograd.grad((expected * upstream).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    layer = layer_of()
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)),
        (x, *layer.parameters()),
    )


@pytest.mark.parametrize("frozen", [(), ("down", "up"), ("values",)])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: tuple[str, ...]) -> None:
    layer, x = layer_of(), torch.randn(4, 7, dtype=torch.float64)
    whole = copy.deepcopy(layer)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    for one in (layer, whole):
        one(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, whole.get_parameter(name).grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_backward_keeps_no_dense_tensor(autocast: bool) -> None:
    layer = LowRankPlusSparseLinear(64, 48, 4, 100)
    x = torch.randn(5, 64, requires_grad=True)
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        result = layer(x)
    parts = {tensor.data_ptr() for tensor in (layer.down, layer.up, layer.values, layer.indices)}
    others = [tensor for tensor in kept if tensor.data_ptr() not in parts]
    assert len(kept) == 5 and len(others) == 1
    assert others[0].shape == x.shape and others[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    result.float().sum().backward()


def test_support_of_a_seed_is_fixed_and_stays() -> None:
    one, same, other = (LowRankPlusSparseLinear(30, 40, 2, 50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.indices, same.indices) and not torch.equal(one.indices, other.indices)
    assert one.indices.dtype == torch.int32 and len(one.indices.unique()) == 50
    before = one.indices.clone()
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
    for _ in range(3):
        one(torch.randn(8, 30)).square().sum().backward()
        optimizer.step()
    assert torch.equal(one.indices, before)
    sparse = (one.weight - one.up @ one.down * (16 / 2)).flatten().detach()
    sparse[before] = 0
    assert float(sparse.abs().max()) < 1e-6


def test_places_are_uniform() -> None:
    counts = sum(
        torch.zeros(20).index_add(0, LowRankPlusSparseLinear(4, 5, 1, 5, seed=seed).indices, torch.ones(5))
        for seed in range(400)
    )
    # 400 draws of 5 of 20 places: 100 each, with a standard deviation of 8.7.
    assert float((counts - 100).abs().max()) < 4 * 8.7


def test_starts_as_its_sparse_part() -> None:
    layer = LowRankPlusSparseLinear(100, 80, 3, 400, bias=False)
    weight = layer.weight.detach()
    assert torch.equal(weight.flatten()[layer.indices], layer.values) and int((weight != 0).sum()) == 400
    assert bool((layer.values.abs() <= 0.1).all()) and bool((layer.down.abs() <= 0.1).all())
    assert float(layer.values.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_bytes_of_the_state() -> None:
    layer = LowRankPlusSparseLinear(100, 80, 3, 400, dtype=torch.bfloat16)
    assert sum(tensor.nbytes for tensor in layer.state_dict().values()) == 2 * (3 * 180 + 400 + 80) + 4 * 400 + 8


def test_autocast_and_bfloat16() -> None:
    layer = layer_of(dtype=torch.float32)
    x = torch.randn(4, 7)
    exact = x.double() @ dense_of(layer).T + layer.bias
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05)
    found.sum().backward()
    assert layer.down.grad.dtype == torch.float32
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16 and int(half.alpha) == 3 and half.indices.dtype == torch.int32
    torch.testing.assert_close(half(x.bfloat16()).double(), exact, rtol=0.05, atol=0.05)


def test_gradient_checkpointing() -> None:
    layer, x = layer_of(), torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_dense_linear() -> None:
    layer, x = layer_of(), torch.randn(4, 7, dtype=torch.float64)
    linear = layer.dense()
    torch.testing.assert_close(linear.weight, dense_of(layer))
    torch.testing.assert_close(linear(x), layer(x))
    assert linear.training and type(linear) is nn.Linear and type(linear.weight) is nn.Parameter


@pytest.mark.parametrize(("rank", "nonzeros"), [(3, 15), (2, 31)])
def test_sizes_out_of_range(rank: int, nonzeros: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank} and nonzeros={nonzeros} .* 7 inputs and 9 outputs"):
        LowRankPlusSparseLinear(7, 9, rank, nonzeros)
    LowRankPlusSparseLinear(7, 9, 2, 30)  # 62 of 63


@pytest.mark.parametrize(("rank", "nonzeros", "named"), [(0, 5, "rank=0"), (2, 0, "nonzeros=0")])
def test_sizes_below_one(rank: int, nonzeros: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} must be an int of at least 1"):
        LowRankPlusSparseLinear(7, 9, rank, nonzeros)


def test_alpha_is_whole() -> None:
    with pytest.raises(TypeError, match=r"alpha=0\.5 must be an int"):
        LowRankPlusSparseLinear(7, 9, 2, 11, alpha=0.5)


def test_supports_of_another_shape_or_layer_are_refused() -> None:
    layer = layer_of()
    state = layer.state_dict()
    other = LowRankPlusSparseLinear(7, 9, 2, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"support has shape \(11,\), and this layer's has \(12,\)"):
        other.load_state_dict(state)
    for broken in (state["indices"].flip(0), state["indices"] + 60):
        with pytest.raises(ValueError, match="places from 0 to 62 in ascending order"):
            layer.load_state_dict({**state, "indices": broken})
