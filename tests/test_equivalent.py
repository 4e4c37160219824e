"""The one-step transforms against PyWavelets and against the polyphase steps that serve everything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.references import WAVELETS, synthesis_matrix
from wara_peft import equivalent, wavelet
from wara_peft.wavelet import Axis, adjoint, analysis, filters, synthesis

# how long an axis may be for matrices to be kept: always, and never
WAYS = {"matrices": 10**6, "convolutions": 0}


def axis_and_rows(name: str, length: int, levels: int, dim: int) -> tuple[Axis, list[torch.Tensor | None]]:
    """Rows of both bands at each level, in no particular order, and untransformed ones."""
    axis = Axis(name, length, ("aa", *["daad" for _ in range(levels)]))
    coefficients = [torch.randn(len(bands), length >> level) for level, bands in enumerate(axis.bands)]
    return axis, [(rows if dim == 1 else rows.T.contiguous()).double() for rows in coefficients]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(equivalent, "LONGEST_MATRIX", WAYS[request.param])
    monkeypatch.setattr(equivalent, "SHORTEST_COLUMN", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("name", [*WAVELETS, "db8"])
def test_synthesis_and_adjoint(name, levels, dim):
    for length in (8, 24, 40, 176):
        axis, coefficients = axis_and_rows(name, length, levels, dim)
        covered = equivalent.covers(axis, filters(name), by_rows=dim == 1)
        filter_length = (len(filters(name).lo) - 1) * (2**levels - 1) + 1
        assert covered == (length >= filter_length and not (name == "haar" and dim == 0))
        expected = []
        for level in range(levels, -1, -1):
            rows = coefficients[level].numpy() if dim == 1 else coefficients[level].numpy().T
            for band, row in zip(axis.bands[level], rows, strict=True):
                expected.append(row if level == 0 else synthesis_matrix(name, length, level, band) @ row)
        found = synthesis(coefficients, axis, dim)
        found = found if dim == 1 else found.T
        np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-12)

        # ⟨S c, x⟩ = ⟨c, Sᵀ x⟩
        signal = torch.randn_like(synthesis(coefficients, axis, dim))
        for transform in (adjoint, analysis):
            back = transform(signal, axis, dim)
            products = sum((rows * other).sum() for rows, other in zip(coefficients, back, strict=True))
            assert products.item() == pytest.approx((synthesis(coefficients, axis, dim) * signal).sum().item())
            assert [part.shape for part in back] == [rows.shape for rows in coefficients]
            # a signal that lies the other way in memory, as gradients of B̂ do
            for part, other in zip(transform(signal.T.contiguous().T, axis, dim), back, strict=True):
                torch.testing.assert_close(part, other, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["haar", "db4"])
def test_gradients_of_any_order(name):
    axis, coefficients = axis_and_rows(name, 56, 3, 1)
    inputs = [rows.requires_grad_() for rows in coefficients]
    torch.autograd.gradcheck(lambda *rows: synthesis(rows, axis, 1), inputs)
    torch.autograd.gradgradcheck(lambda *rows: synthesis(rows, axis, 1).square(), inputs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["haar", "db4"])
def test_short_dtypes(name, dtype):
    axis, coefficients = axis_and_rows(name, 64, 2, 1)
    coefficients = [rows.to(dtype) for rows in coefficients]
    found = synthesis(coefficients, axis, 1)
    assert found.dtype == dtype
    exact = synthesis([rows.double() for rows in coefficients], axis, 1)
    assert (found.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_constants_made_in_inference_mode_serve_training():
    axis = Axis("db3", 48, ("", "ad"))
    with torch.inference_mode():
        synthesis([None, torch.randn(2, 24)], axis, 1)
    rows = torch.randn(2, 24, requires_grad=True)
    synthesis([None, rows], axis, 1).sum().backward()
    assert rows.grad is not None


@pytest.mark.parametrize("dim", [0, 1])
def test_which_axes_take_the_fast_path(dim, monkeypatch):
    calls = []
    monkeypatch.setattr(wavelet, "_synthesise", lambda *a: calls.append(1) or torch.zeros(1))
    for length, levels, fast in [(64, 3, True), (60, 3, False), (65, 1, False), (6, 1, False)]:
        calls.clear()
        axis = Axis("db4", length, ("", *["ad" for _ in range(levels)]))
        rows = [torch.randn((2, size) if dim == 1 else (size, 2)) for size in axis.sizes[1:]]
        synthesis([None, *rows], axis, dim)
        assert bool(calls) != fast, (length, levels)
