"""Constant tensors are made on the device of what they meet, and what a passing mode made of them is not kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.references import inverse_transform, synthesis_matrix, transform
from wara_peft.forms.token_grid import TokenGrid
from wara_peft.forms.token_mixing import TokenMixing, grid_subbands
from wara_peft.wavelet import Axis, adjoint, synthesis, synthesis_at

# one for each way of the transforms
WAVELETS = ("haar", "db3")
LEVELS = 2
# Every test takes one that no other has used, so that nothing is kept for it yet.
LENGTHS = itertools.count(60, 2**LEVELS)


def use(name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Everything that takes constants: both transforms, single columns, and the grid's projections of the rows."""
    length = rows.shape[1] << LEVELS
    axis = Axis(name, length, ("", "", "ad"))
    # the device by name: an explicit one is right whatever the default is
    positions = torch.tensor([3, 0, length - 1], device=rows.device)
    whole = synthesis([None, None, rows], axis, 1)
    columns = synthesis_at([None, None, rows], axis, positions)
    (back,) = (part for part in adjoint(whole, axis, 1) if part is not None)
    mixing = TokenMixing("proj", TokenGrid((length, 1), 0), name, grid_subbands(1))
    tokens = whole[0].reshape(1, length, 1).expand(-1, -1, len(mixing.channels))
    return whole, columns, back, mixing(tokens)


def check(name: str, rows: torch.Tensor) -> None:
    """The same by PyWavelets."""
    whole, columns, back, mixed = (found.detach().numpy() for found in use(name, rows))
    length = rows.shape[1] << LEVELS
    matrices = [synthesis_matrix(name, length, LEVELS, band) for band in "ad"]
    expected = np.stack([matrix @ row for matrix, row in zip(matrices, rows.numpy(), strict=True)])
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    np.testing.assert_allclose(columns, expected[:, [3, 0, length - 1]], atol=1e-12)
    projected = np.stack([matrix.T @ row for matrix, row in zip(matrices, expected, strict=True)])
    np.testing.assert_allclose(back, projected, atol=1e-12)
    grid = expected[0][:, None]
    bands = transform(grid, name, 1)
    parts = [inverse_transform({band.name: bands[band.name]}, name, grid.shape, 1)[:, 0] for band in grid_subbands(1)]
    np.testing.assert_allclose(mixed[0], np.stack(parts, axis=1), atol=1e-12)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(2, next(LENGTHS) >> LEVELS, dtype=torch.float64)


@pytest.fixture(params=["context", "set"])
def other_default_device(request):
    """A default device on which nothing has values, given in either way."""
    if request.param == "context":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)


@pytest.mark.parametrize("name", WAVELETS)
def test_first_use_under_another_default_device(name, rows, other_default_device):
    assert {found.device.type for found in use(name, rows)} == {"cpu"}
    check(name, rows)


@pytest.mark.parametrize("name", WAVELETS)
def test_what_other_default_devices_saw_serves_later(name, rows):
    with torch.device("meta"):
        use(name, rows)
    check(name, rows)


@pytest.mark.parametrize("order", ["fake first", "real first"])
@pytest.mark.parametrize("name", WAVELETS)
def test_fake_tensors(name, rows, order):
    if order == "real first":
        use(name, rows)
    mode = FakeTensorMode()
    fake = mode.from_tensor(rows)
    with mode:
        inside = use(name, fake)
    for found in inside:
        assert isinstance(found, FakeTensor)
    assert [found.shape for found in inside] == [found.shape for found in use(name, rows)]
    check(name, rows)


@pytest.mark.parametrize("name", WAVELETS)
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(lambda call, rows: torch.func.vmap(call)(rows.expand(3, -1, -1)), id="vmap"),
        pytest.param(lambda call, rows: torch.func.grad(lambda x: call(x)[0].sum())(rows), id="grad"),
        pytest.param(lambda call, rows: torch.func.functionalize(call)(rows), id="functionalize"),
        pytest.param(lambda call, rows: make_fx(call)(rows), id="make_fx"),
        pytest.param(lambda call, rows: make_fx(call, tracing_mode="fake")(rows), id="make_fx fake"),
        pytest.param(lambda call, rows: torch.inference_mode()(call)(rows), id="inference mode"),
        pytest.param(lambda call, rows: torch.autocast("cpu", torch.bfloat16)(call)(rows), id="autocast"),
    ],
)
def test_what_modes_and_transforms_saw_serves_later(name, rows, first):
    first(lambda x: use(name, x), rows)
    check(name, rows)
    rows.requires_grad_()
    synthesis([None, None, rows], Axis(name, rows.shape[1] << LEVELS, ("", "", "ad")), 1).sum().backward()
    expected = np.stack([synthesis_matrix(name, rows.shape[1] << LEVELS, LEVELS, band).sum(0) for band in "ad"])
    np.testing.assert_allclose(rows.grad.numpy(), expected, atol=1e-12)
