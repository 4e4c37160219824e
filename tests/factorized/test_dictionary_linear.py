"""The layer beside dense algebra and NumPy's bits, and what it takes on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wara_peft.factorized import DictionaryLinear
from wara_peft.factorized.sparse_rows import pack_bits, unpack_bits


def layer_of(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[DictionaryLinear, torch.Tensor]:
    """A layer of 7 inputs, 9 outputs, 13 atoms and 4 values, and its dense coefficients."""
    layer = DictionaryLinear(7, 9, 13, 4, bias, dtype=dtype)
    places = torch.stack([torch.randperm(13) < 4 for _ in range(9)])
    with torch.no_grad():
        layer.support.copy_(pack_bits(places))
        layer.values.normal_()
        if bias:
            layer.bias.normal_()
    dense = torch.zeros(9, 13, dtype=dtype)
    for row in range(9):
        dense[row, places[row].nonzero().flatten()] = layer.values[row].detach()
    return layer, dense


@pytest.mark.parametrize("atoms", [1, 7, 8, 9, 40])
def test_bits(atoms: int) -> None:
    places = torch.rand(5, atoms) < 0.5
    assert np.array_equal(pack_bits(places).numpy(), np.packbits(places.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack_bits(pack_bits(places), atoms), places)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(bias: bool) -> None:
    layer, dense = layer_of(bias)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(layer.weight, dense @ layer.down.weight)
    expected = x @ layer.down.weight.T @ dense.T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    dense.requires_grad_()
    upstream = torch.randn(2, 3, 9, dtype=torch.float64)
    (of_dense,) = torch.autograd.grad(((x @ layer.down.weight.T @ dense.T) * upstream).sum(), dense)
    (of_values,) = torch.autograd.grad((layer(x) * upstream).sum(), layer.values)
    torch.testing.assert_close(of_values, of_dense[unpack_bits(layer.support, 13)].view(9, 4))


def test_bytes_on_disk(tmp_path: Path) -> None:
    layer = DictionaryLinear(300, 400, 120, 60, dtype=torch.bfloat16)
    save_file(layer.state_dict(), tmp_path / "a.safetensors")
    expected = 2 * (120 * 300 + 400 * 60 + 400) + 400 * 120 // 8
    assert sum(tensor.nbytes for tensor in layer.state_dict().values()) == expected
    assert (tmp_path / "a.safetensors").stat().st_size == pytest.approx(expected, rel=0.01)


def test_dtype_and_copies_keep_the_places() -> None:
    layer, dense = layer_of()
    other = copy.deepcopy(layer).bfloat16()
    assert other.support.dtype == torch.uint8
    torch.testing.assert_close(other.coefficients.double(), dense, rtol=0.01, atol=0)
    assert layer.state_dict().keys() == {"down.weight", "values", "support", "bias"}


@pytest.mark.parametrize(("atoms", "nonzeros"), [(4, 5), (4, 0)])
def test_out_of_range(atoms: int, nonzeros: int) -> None:
    with pytest.raises(ValueError, match=f"nonzeros={nonzeros} must be an int from 1 to {atoms}"):
        DictionaryLinear(7, 9, atoms, nonzeros)
    assert isinstance(DictionaryLinear(7, 9, 4, 4).down, nn.Linear)
