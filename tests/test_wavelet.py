"""Filters and 1-D transforms against PyWavelets and dense algebra in float64."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

from tests.references import WAVELETS, sizes, synthesis_matrix
from wara_peft.wavelet import Axis, adjoint, analysis, axis_sizes, filters, max_useful_level, subbands, synthesis

LENGTHS = (1, 2, 3, 5, 8, 13, 16, 22)

each_levels = pytest.mark.parametrize("levels", [1, 2, 3])


def rows_in_every_band(wavelet: str, length: int, levels: int, count: int = 1) -> Axis:
    """`count` rows in each band: a and d of the coarsest level, d of the finer ones."""
    return Axis(wavelet, length, ("", *("d" * count for _ in range(levels - 1)), "a" * count + "d" * count))


def dense_matrix(axis: Axis) -> np.ndarray:
    """[S_{L,a} S_{L,d} ... S_{1,d}] of shape (d, Σ d_j), from PyWavelets."""
    blocks = [synthesis_matrix(axis.wavelet, axis.length, axis.levels, "a")]
    blocks += [synthesis_matrix(axis.wavelet, axis.length, level, "d") for level in range(axis.levels, 0, -1)]
    return np.concatenate(blocks, axis=1)


def stacked(coefficients: list[torch.Tensor | None], count: int) -> np.ndarray:
    """Coefficients of `count` signals as columns, in the order of the columns of `dense_matrix`."""
    coarsest, *finer = [level for level in reversed(coefficients) if level is not None]
    return np.concatenate([coarsest[:count].T, coarsest[count:].T, *(level.T for level in finer)])


@each_levels
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_synthesis_equals_pywavelets(wavelet, levels, dim):
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        bands = ("aa",) + ("dad",) * levels
        rows = [
            rng.standard_normal((len(letters), size))
            for letters, size in zip(bands, sizes(length, levels), strict=True)
        ]
        expected = [
            synthesis_matrix(wavelet, length, level, letter) @ row
            for level in range(levels, 0, -1)
            for letter, row in zip(bands[level], rows[level], strict=True)
        ]

        coefficients = [torch.from_numpy(row if dim == 1 else row.T) for row in rows]
        found = synthesis(coefficients, Axis(wavelet, length, bands), dim).numpy()

        np.testing.assert_allclose(found if dim == 1 else found.T, np.stack([*expected, *rows[0]]), atol=1e-12)


@each_levels
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_adjoint_is_the_transpose_and_analysis_is_pywavelets(wavelet, levels):
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        count = 3
        axis = rows_in_every_band(wavelet, length, levels, count)
        signals = rng.standard_normal((count, length))
        repeated = torch.from_numpy(np.tile(signals, (levels + 1, 1)))

        transposed = stacked(adjoint(repeated, axis, 1), count)
        np.testing.assert_allclose(transposed, dense_matrix(axis).T @ signals.T, atol=1e-12)

        approximation, details = signals, []
        for _ in range(levels):
            approximation, detail = pywt.dwt(approximation, wavelet, mode="periodization", axis=1)
            details.insert(0, detail)
        expected = np.concatenate([approximation, *details], axis=1).T
        np.testing.assert_allclose(stacked(analysis(repeated, axis, 1), count), expected, atol=1e-12)


@each_levels
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_identities(wavelet, levels):
    for length in LENGTHS:
        axis = rows_in_every_band(wavelet, length, levels, count=length)
        identity = torch.eye(length, dtype=torch.float64)
        repeated = identity.repeat(levels + 1, 1)

        # S Sᵀ = I and synthesis ∘ analysis = I at every size: the sum over all bands of what came back.
        for transform in (adjoint, analysis):
            back = synthesis(transform(repeated, axis, 1), axis, 1).view(levels + 1, length, length).sum(0)
            torch.testing.assert_close(back, identity, atol=1e-11, rtol=0)

        # SᵀS = I, and adjoint and analysis agree, where 2^levels divides the length.
        if length % 2**levels == 0:
            s = torch.from_numpy(stacked(adjoint(repeated, axis, 1), length))
            torch.testing.assert_close(s @ s.T, identity, atol=1e-11, rtol=0)
            same = torch.from_numpy(stacked(analysis(repeated, axis, 1), length))
            torch.testing.assert_close(s, same, atol=1e-14, rtol=0)


def test_analysis_repeats_the_last_sample_of_odd_lengths():
    signal = torch.tensor([[1.0, 2.0, 5.0]] * 2, dtype=torch.float64)
    axis = Axis("haar", 3, ("", "ad"))
    root = 2**0.5
    expected = [[3 / root, 10 / root], [-1 / root, 0.0]]
    torch.testing.assert_close(analysis(signal, axis, 1)[1], torch.tensor(expected, dtype=torch.float64))


@each_levels
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_gradients(wavelet, levels, dim):
    for length in (1, 6, 11):
        axis = Axis(wavelet, length, ("aa",) + ("dad",) * levels)
        shapes = [(len(band), size) for band, size in zip(axis.bands, axis.sizes, strict=True)]
        rows = [torch.randn(s if dim == 1 else s[::-1], dtype=torch.float64, requires_grad=True) for s in shapes]

        def transform(*coefficients, axis=axis):
            return synthesis(coefficients, axis, dim)

        assert torch.autograd.gradcheck(transform, rows)
        assert torch.autograd.gradgradcheck(transform, rows)


@each_levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_dtypes_are_kept_also_under_autocast(wavelet, levels, dtype):
    axis = rows_in_every_band(wavelet, 13, levels)
    shapes = [(len(band), size) for band, size in zip(axis.bands, axis.sizes, strict=True)]
    exact = [torch.randn(shape, dtype=torch.float64) if shape[0] else None for shape in shapes]
    rounded = [None if rows is None else rows.to(dtype) for rows in exact]
    expected = synthesis([None if rows is None else rows.double() for rows in rounded], axis, 1)
    tolerance = 32 * torch.finfo(dtype).eps  # a rounding for each tap and level

    plain = synthesis(rounded, axis, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = synthesis(rounded, axis, 1)

    assert plain.dtype == inside.dtype == dtype
    torch.testing.assert_close(plain.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(inside, plain, atol=0, rtol=0)


@each_levels
def test_meta_device(levels):
    axis = rows_in_every_band("db4", 13, levels)
    rows = [torch.empty(len(b), s, device="meta") for b, s in zip(axis.bands, axis.sizes, strict=True)]
    found = synthesis([level if len(level) else None for level in rows], axis, 1)
    assert found.device.type == "meta"
    assert found.shape == (levels + 1, 13)


@each_levels
@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_compiles_without_graph_breaks(wavelet, levels):
    axis = Axis(wavelet, 13, ("a",) + ("ad",) * levels)
    shapes = [(len(band), size) for band, size in zip(axis.bands, axis.sizes, strict=True)]
    rows = [torch.randn(shape, requires_grad=True) for shape in shapes]

    @torch.compile(fullgraph=True)
    def compiled(*coefficients):
        return synthesis(coefficients, axis, 1)

    weight = torch.randn(axis.rows, 13)
    expected = synthesis(rows, axis, 1)
    found = compiled(*rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found, rows, weight),
        torch.autograd.grad(expected, rows, weight),
        atol=1e-5,
        rtol=1e-5,
    )


@each_levels
def test_backward_saves_nothing(levels):
    axis = Axis("db4", 64, ("",) + ("adad",) * levels)
    shapes = [(len(band), size) for band, size in zip(axis.bands, axis.sizes, strict=True)]
    rows = [torch.randn(shape, requires_grad=True) if shape[0] else None for shape in shapes]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda _: None):
        synthesis(rows, axis, 1)
    assert saved == []


@each_levels
def test_subbands_have_the_shapes_of_pywavelets(levels):
    for m, n in ((1, 1), (5, 8), (12, 7)):
        current = np.zeros((m, n))
        for level in range(1, levels + 1):
            current = pywt.dwtn(current, "haar", mode="periodization")
            named = {band.name: band.shape(m, n) for band in subbands(levels) if band.level == level}
            # pywt's coarser approximations are transformed further, so only the coarsest is named.
            assert named == {f"{name}{level}": c.shape for name, c in current.items() if f"{name}{level}" in named}
            assert len(named) == (4 if level == levels else 3)
            current = current["aa"]
    assert subbands(levels)[-1].name == "aa0"
    assert subbands(levels)[-1].shape(5, 8) == (5, 8)


@each_levels
def test_wrong_shapes_are_refused(levels):
    axis = rows_in_every_band("haar", 8, levels)
    rows = [None, *(torch.zeros(len(b), s) for b, s in zip(axis.bands[1:], axis.sizes[1:], strict=True))]
    with pytest.raises(ValueError, match=rf"Rows of level {levels} must have shape \(2, "):
        synthesis([*rows[:-1], torch.zeros(2, 9)], axis, 1)
    with pytest.raises(ValueError, match="got 1 entries"):
        synthesis(rows[:1], axis, 1)


@each_levels
def test_axis_sizes_round_up(levels):
    assert axis_sizes(13, levels) == (13, 7, 4, 2)[: levels + 1]


def test_filters_accept_every_orthogonal_name_and_no_other():
    for name in pywt.wavelist(kind="discrete"):
        wavelet = pywt.Wavelet(name)
        if wavelet.orthogonal:
            assert filters(name).lo == tuple(wavelet.rec_lo)
            assert filters(name).hi == tuple(wavelet.rec_hi)
        else:
            with pytest.raises(ValueError, match="not orthogonal"):
                filters(name)
    with pytest.raises(ValueError, match=r"'hara' is not a wavelet.*did you mean 'haar'"):
        filters("hara")
    with pytest.raises(ValueError, match="levels=0"):
        subbands(0)


def test_max_useful_level_is_that_of_pywavelets():
    assert [max_useful_level("haar", length) for length in (1, 2, 3, 8)] == [0, 1, 1, 3]
    assert max_useful_level("db4", 100) == pywt.dwt_max_level(100, pywt.Wavelet("db4"))


def test_identity_of_every_orthogonal_wavelet():
    for name in pywt.wavelist(kind="discrete"):
        if pywt.Wavelet(name).orthogonal:
            for length in (7, 16):
                axis = rows_in_every_band(name, length, 2, count=length)
                identity = torch.eye(length, dtype=torch.float64)
                back = synthesis(adjoint(identity.repeat(3, 1), axis, 1), axis, 1).view(3, length, length).sum(0)
                tolerance = 1e-2 if name == "dmey" else 1e-9
                torch.testing.assert_close(back, identity, atol=tolerance, rtol=0, msg=name)
