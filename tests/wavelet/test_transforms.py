"""1-D transforms against PyWavelets and dense algebra in float64, by every way in which they can be computed."""

from __future__ import annotations

import sys
from functools import cache, partial

import numpy as np
import pytest
import pywt
import torch

from tests.references import WAVELETS
from tests.references import synthesis_matrix as build_synthesis_matrix
from wara_peft.wavelet import Axis, adjoint, haar, one_step, synthesis, synthesis_at, transforms

# below the length of the filters, odd at every level, odd at some, divided by all
LENGTHS = (1, 2, 3, 5, 8, 13, 22, 24, 37, 48)
LEVELS = (1, 2, 3, 4)
# bands of the rows of level 1 and coarser, by number of levels
EQUAL_RANKS = {levels: (*("dad",) * (levels - 1), "adad") for levels in LEVELS}
DIFFERENT_RANKS = {levels: ("dad", "da", "addad", "d")[:levels] for levels in LEVELS}
NO_HAAR = (haar, "serves", lambda *_: False)
BLOCKS = [NO_HAAR, (one_step, "DEVICES", ())]
# a layout; and what is chosen by it, wavelet, device, dtype and mode, forced: an attribute of a module, and its value
WAYS = {
    "as chosen": (DIFFERENT_RANKS, []),
    "one step": (EQUAL_RANKS, [NO_HAAR]),
    "blocks": (DIFFERENT_RANKS, BLOCKS),
    "blocks, without a node": (DIFFERENT_RANKS, [*BLOCKS, (transforms, "is_transformed", lambda: True)]),
}
layout = DIFFERENT_RANKS

synthesis_matrix = cache(build_synthesis_matrix)
each_levels = pytest.mark.parametrize("levels", LEVELS)
each_wavelet = pytest.mark.parametrize("wavelet", WAVELETS)
each_dim = pytest.mark.parametrize("dim", [0, 1])


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    bands, forced = WAYS[request.param]
    monkeypatch.setattr(sys.modules[__name__], "layout", bands)
    for module, name, value in forced:
        monkeypatch.setattr(module, name, value)


def axis_of(wavelet: str, length: int, levels: int) -> Axis:
    """Rows of each level, and untransformed ones."""
    return Axis(wavelet, length, ("aa", *layout[levels]))


def coefficients_of(axis: Axis, dim: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
    shapes = [(len(bands), size) for bands, size in zip(axis.bands, axis.sizes, strict=True)]
    return [torch.randn(s if dim == 1 else s[::-1]).to(dtype) if s[0] else None for s in shapes]


def expected_synthesis(coefficients: list[torch.Tensor | None], axis: Axis, dim: int) -> np.ndarray:
    """By PyWavelets, in float64."""
    result = []
    for level in range(axis.levels, -1, -1):
        if axis.bands[level]:
            rows = coefficients[level].detach().double().numpy()
            for band, row in zip(axis.bands[level], rows if dim == 1 else rows.T, strict=True):
                matrix = synthesis_matrix(axis.wavelet, axis.length, level, band) if level else np.eye(axis.length)
                result.append(matrix @ row)
    return np.stack(result) if dim == 1 else np.stack(result, axis=1)


@pytest.mark.usefixtures("way")
@each_levels
@each_dim
@each_wavelet
def test_synthesis_equals_pywavelets_and_adjoint_is_its_transpose(wavelet, levels, dim):
    for length in LENGTHS:
        axis = axis_of(wavelet, length, levels)
        coefficients = coefficients_of(axis, dim)
        found = synthesis(coefficients, axis, dim)
        expected = expected_synthesis(coefficients, axis, dim)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)

        signal = torch.randn_like(found)
        rows = signal if dim == 1 else signal.T
        transposed = []
        for level in range(axis.levels, -1, -1):
            own, rows = rows.split([len(axis.bands[level]), len(rows) - len(axis.bands[level])])
            matrices = [
                synthesis_matrix(wavelet, length, level, band) if level else np.eye(length)
                for band in axis.bands[level]
            ]
            products = np.stack([matrix.T @ row for matrix, row in zip(matrices, own.numpy(), strict=True)])
            transposed.insert(0, products if dim == 1 else products.T)
        # as gradients lie that are transposes of products, too
        for lying in (signal.contiguous(), signal.T.contiguous().T):
            for part, other in zip(adjoint(lying, axis, dim), transposed, strict=True):
                np.testing.assert_allclose(part.numpy(), other, atol=1e-12)


@pytest.mark.usefixtures("way")
@each_levels
@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_levels_without_rows(wavelet, levels):
    for length in (24, 37):
        for filled in range(2 ** (levels + 1)):
            bands = tuple("daa" if filled >> level & 1 else "" for level in range(levels + 1))
            axis = Axis(wavelet, length, bands)
            if not axis.rows:
                continue
            coefficients = coefficients_of(axis, 1)
            found = synthesis(coefficients, axis, 1)
            np.testing.assert_allclose(found.numpy(), expected_synthesis(coefficients, axis, 1), atol=1e-12)
            signal = torch.randn_like(found)
            back = adjoint(signal, axis, 1)
            assert [part is None for part in back] == [rows is None for rows in coefficients]
            products = [(part * rows).sum() for part, rows in zip(back, coefficients, strict=True) if part is not None]
            torch.testing.assert_close(sum(products), (found * signal).sum())


@pytest.mark.usefixtures("way")
@each_levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_dim
@each_wavelet
def test_dtypes_are_kept_also_under_autocast(wavelet, levels, dtype, dim):
    for length in (13, 48):
        axis = axis_of(wavelet, length, levels)
        coefficients = coefficients_of(axis, dim, dtype)
        tolerance = 32 * torch.finfo(dtype).eps  # a rounding for each tap and level
        plain = synthesis(coefficients, axis, dim)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = synthesis(coefficients, axis, dim)
        assert plain.dtype == inside.dtype == dtype
        torch.testing.assert_close(inside, plain, atol=0, rtol=0)
        expected = expected_synthesis(coefficients, axis, dim)
        np.testing.assert_allclose(plain.double().numpy(), expected, atol=tolerance, rtol=tolerance)

        back = adjoint(plain, axis, dim)
        exact = adjoint(plain.double(), axis, dim)
        for part, other in zip(back, exact, strict=True):
            assert part.dtype == dtype
            torch.testing.assert_close(part.double(), other, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_kernels_stay_as_they_are(wavelet, levels):
    for length in (24, 37):
        axis = axis_of(wavelet, length, levels)
        coefficients = [rows[..., None, None] * torch.randn(3, 2).double() for rows in coefficients_of(axis, 1)]
        found = synthesis(coefficients, axis, 1)
        back = adjoint(found, axis, 1)
        for i in range(3):
            for j in range(2):
                own = [rows[..., i, j] for rows in coefficients]
                np.testing.assert_allclose(found[..., i, j], expected_synthesis(own, axis, 1), atol=1e-12)
                for part, other in zip(back, adjoint(found[..., i, j], axis, 1), strict=True):
                    torch.testing.assert_close(part[..., i, j], other, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("way")
@each_levels
@each_wavelet
def test_single_columns(wavelet, levels):
    for length in LENGTHS:
        axis = axis_of(wavelet, length, levels)
        coefficients = coefficients_of(axis, 1)
        positions = torch.randint(length, (7,))
        found = synthesis_at(coefficients, axis, positions)
        expected = expected_synthesis(coefficients, axis, 1)[:, positions.numpy()]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@each_levels
@each_wavelet
def test_identities(wavelet, levels):
    for length in LENGTHS:
        # `length` rows in each band: a and d of the coarsest level, d of the finer ones
        axis = Axis(wavelet, length, ("", *("d" * length,) * (levels - 1), "a" * length + "d" * length))
        identity = torch.eye(length, dtype=torch.float64)
        parts = adjoint(identity.repeat(levels + 1, 1), axis, 1)

        # S Sᵀ = I at every size: the sum over all bands of what came back.
        back = synthesis(parts, axis, 1).view(levels + 1, length, length).sum(0)
        torch.testing.assert_close(back, identity, atol=1e-11, rtol=0)

        # SᵀS = I, and the adjoint is PyWavelets' own transform, where 2^levels divides the length.
        if length % 2**levels == 0:
            coarsest, *finer = [rows.numpy() for rows in reversed(parts[1:])]
            found = [coarsest[:length].T, coarsest[length:].T, *(rows.T for rows in finer)]
            s = np.concatenate(found)
            np.testing.assert_allclose(s @ s.T, np.eye(length), atol=1e-11)
            approximation = np.eye(length)
            for level in range(levels):
                approximation, detail = pywt.dwt(approximation, wavelet, mode="periodization", axis=0)
                np.testing.assert_allclose(found[-1 - level], detail, atol=1e-12)
            np.testing.assert_allclose(found[0], approximation, atol=1e-12)


def test_identity_of_every_orthogonal_wavelet():
    for name in pywt.wavelist(kind="discrete"):
        if pywt.Wavelet(name).orthogonal:
            for length in (7, 16):
                axis = Axis(name, length, ("", "d" * length, "a" * length + "d" * length))
                identity = torch.eye(length, dtype=torch.float64)
                back = synthesis(adjoint(identity.repeat(3, 1), axis, 1), axis, 1).view(3, length, length).sum(0)
                tolerance = 1e-2 if name == "dmey" else 1e-9
                torch.testing.assert_close(back, identity, atol=tolerance, rtol=0, msg=name)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("levels", [1, 3])
@each_dim
@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_gradients_of_any_order(wavelet, levels, dim):
    for length in (1, 6, 11):
        axis = axis_of(wavelet, length, levels)
        rows = [part.requires_grad_() for part in coefficients_of(axis, dim)]

        def transform(*coefficients, axis=axis):
            return synthesis(coefficients, axis, dim)

        # Along random directions: of a linear transform, one that is wrong anywhere is wrong along almost all of them.
        assert torch.autograd.gradcheck(transform, rows, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *rows, call=transform: call(*rows).square(), rows, fast_mode=True)
        signal = transform(*rows).detach().requires_grad_()
        back = partial(adjoint, axis=axis, dim=dim)
        assert torch.autograd.gradcheck(lambda signal, call=back: tuple(call(signal)), [signal], fast_mode=True)

        # The third: of Σ (S c)³ in the direction v it is 6 Sᵀ (S v)².
        energy, direction = (transform(*rows) ** 3).sum(), [torch.randn_like(part) for part in rows]
        for _ in range(2):
            grads = torch.autograd.grad(energy, rows, create_graph=True)
            energy = sum((grad * part).sum() for grad, part in zip(grads, direction, strict=True))
        expected = adjoint(6 * transform(*direction) ** 2, axis, dim)
        for found, part in zip(torch.autograd.grad(energy, rows), expected, strict=True):
            torch.testing.assert_close(found, part, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_transforms_of_torch_func(wavelet):
    axis = axis_of(wavelet, 13, 2)
    coefficients = coefficients_of(axis, 1)

    def call(*rows):
        return synthesis(rows, axis, 1)

    stacked = [torch.stack([rows, -2 * rows]) for rows in coefficients]
    expected = expected_synthesis(coefficients, axis, 1)
    found = torch.func.vmap(call)(*stacked)
    np.testing.assert_allclose(found.numpy(), np.stack([expected, -2 * expected]), atol=1e-12)

    value, tangent = torch.func.jvp(call, tuple(coefficients), tuple(3 * rows for rows in coefficients))
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(tangent.numpy(), 3 * expected, atol=1e-12)

    signal = torch.randn_like(value)
    for found, other in zip(torch.func.vjp(call, *coefficients)[1](signal), adjoint(signal, axis, 1), strict=True):
        torch.testing.assert_close(found, other, atol=1e-12, rtol=0)


@each_levels
def test_meta_device(levels):
    for wavelet in ("haar", "db4"):
        axis = axis_of(wavelet, 13, levels)
        found = synthesis([rows.to("meta") for rows in coefficients_of(axis, 1)], axis, 1)
        assert found.device.type == "meta"
        assert found.shape == (axis.rows, 13)
        assert [part.shape for part in adjoint(found, axis, 1)] == [rows.shape for rows in coefficients_of(axis, 1)]


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("levels", [1, 3])
@each_dim
@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_compiles_without_graph_breaks(wavelet, levels, dim):
    axis = axis_of(wavelet, 13, levels)
    rows = [part.requires_grad_() for part in coefficients_of(axis, dim, torch.float32)]

    @torch.compile(fullgraph=True)
    def compiled(*coefficients):
        return synthesis(coefficients, axis, dim)

    found, expected = compiled(*rows), synthesis(rows, axis, dim)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(expected)
    of_compiled = torch.autograd.grad(found, rows, weight)
    torch.testing.assert_close(of_compiled, torch.autograd.grad(expected, rows, weight), atol=1e-5, rtol=1e-5)


@each_levels
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.compiler])])
def test_backward_saves_nothing(levels, compiled):
    axis = axis_of("db4", 64, levels)
    rows = [part.requires_grad_() for part in coefficients_of(axis, 1)]

    def call(*rows):
        return synthesis(rows, axis, 1)

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda _: None):
        (torch.compile(call) if compiled else call)(*rows)
    assert saved == []


def test_what_has_no_kernel_or_many_blocks_takes_other_ways(monkeypatch):
    equal, different = (Axis("db4", 24, ("aa", *bands[2])) for bands in (EQUAL_RANKS, DIFFERENT_RANKS))
    rows, others = coefficients_of(equal, 1), coefficients_of(different, 1)
    calls = []
    monkeypatch.setattr(one_step, "synthesise", lambda *arguments: calls.append(arguments) or torch.zeros(7, 24))
    synthesis(rows, equal, 1)
    assert len(calls) == 1
    np.testing.assert_allclose(synthesis(others, different, 1), expected_synthesis(others, different, 1), atol=1e-12)
    for name, without in (("DEVICES", ("cuda",)), ("DTYPES", (torch.float32,))):
        with monkeypatch.context() as patch:
            patch.setattr(one_step, name, without)
            np.testing.assert_allclose(synthesis(rows, equal, 1), expected_synthesis(rows, equal, 1), atol=1e-12)
    assert len(calls) == 1


def test_long_axes_of_many_blocks():
    for wavelet, levels, length in (("db4", 3, 1000), ("db4", 1, 999), ("haar", 3, 514), ("db16", 2, 260)):
        for bands in (EQUAL_RANKS, DIFFERENT_RANKS):
            axis = Axis(wavelet, length, ("", *bands[levels]))
            for dim in (0, 1):
                coefficients = coefficients_of(axis, dim)
                found = synthesis(coefficients, axis, dim)
                np.testing.assert_allclose(found, expected_synthesis(coefficients, axis, dim), atol=1e-12)
                # <S c, s> = <c, S* s>
                signal = torch.randn_like(found)
                back = adjoint(signal, axis, dim)
                products = [
                    (part * rows).sum() for part, rows in zip(back, coefficients, strict=True) if rows is not None
                ]
                torch.testing.assert_close(sum(products), (found * signal).sum(), atol=1e-9, rtol=1e-12)


@each_levels
def test_wrong_shapes_are_refused(levels):
    axis = Axis("haar", 8, ("", *("d",) * (levels - 1), "ad"))
    rows = coefficients_of(axis, 1)
    with pytest.raises(ValueError, match=rf"Rows of level {levels} must have shape \(2, "):
        synthesis([*rows[:-1], torch.zeros(2, 9)], axis, 1)
    with pytest.raises(ValueError, match="got 1 entries"):
        synthesis(rows[:1], axis, 1)
    with pytest.raises(ValueError, match=r"Rows of level 1 must have shape \(\d, 4\) with dim=1, got \(0, 4\)"):
        synthesis([None, None, *rows[2:]], axis, 1)
