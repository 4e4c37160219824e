"""Identities of the low-rank solvers in float64, beside NumPy's SVD of T W S with roots made here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from wara_peft.compression.methods import METHODS
from wara_peft.compression.solvers.low_rank import Metric, energies, low_rank
from wara_peft.compression.solvers.table import solver_of
from wara_peft.compression.statistics.layer_statistics import LayerStatistics

SHAPES = [(9, 14), (14, 9), (11, 11)]


def inputs(n: int, count: int = 60, dead: int = 0) -> Tensor:
    """Correlated inputs with a mean, (count, n), of which the first few are always zero."""
    x = torch.randn(count, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)
    x = x * torch.logspace(0, -3, n, dtype=torch.float64) + torch.randn(n, dtype=torch.float64)
    x[:, :dead] = 0
    return x


def metric_of(solver: str, statistics: LayerStatistics, compensates: bool) -> Metric:
    method = METHODS[solver](0.5)
    return solver_of(method).metric(method, statistics, compensates)


def statistics_of(x: Tensor, g: Tensor) -> LayerStatistics:
    n, m = x.shape[1], g.shape[1]
    return LayerStatistics(
        (m, n), len(x), torch.zeros(16), x.T @ x / len(x), x.mean(0), g.T @ g / len(g), (x**2).mean(0) * (g**2).sum()
    )


def svd_root(moment: Tensor) -> np.ndarray:
    """A root of another kind than the solvers': symmetric, by SVD."""
    u, s, _ = np.linalg.svd(moment.numpy())
    return u * np.sqrt(s) @ u.T


def weight_of(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class TestIdentities:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [1, 4, 8])
    @pytest.mark.parametrize(
        "kind", ["regular", "dead inputs", "fewer samples than inputs", "nearly singular", "centred"]
    )
    def test_output_error_is_the_tail_of_the_singular_values(self, shape, rank: int, kind: str) -> None:
        w = weight_of(shape)
        n = shape[1]
        x = inputs(n, 5 if kind.startswith("fewer") else 60, 3 if kind.startswith("dead") else 0)
        if kind.startswith("nearly"):
            x[:, 0] = x[:, 1] + 1e-9 * x[:, 2]
        statistics = statistics_of(x, torch.randn(60, shape[0], dtype=torch.float64))
        center = kind == "centred"
        found = low_rank(w, rank, metric_of("activation", statistics, center))
        seen = x - x.mean(0) if center else x
        values = np.linalg.svd(w.numpy() @ seen.T.numpy(), compute_uv=False) ** 2 / len(x)
        difference = (w - found.up @ found.down) @ seen.T
        tail, total = values[rank:].sum(), values.sum()
        assert float(difference.square().sum()) / len(x) == pytest.approx(tail, rel=1e-6, abs=1e-12 * total)
        assert found.lost == pytest.approx(tail, rel=1e-6, abs=1e-12 * total)
        assert found.energy == pytest.approx(total, rel=1e-9)
        assert found.up.shape == (shape[0], rank) and found.down.shape == (rank, n)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_svd_is_that_of_numpy(self, shape) -> None:
        w = weight_of(shape)
        u, s, vt = np.linalg.svd(w.numpy(), full_matrices=False)
        found = low_rank(w, 4, Metric())
        np.testing.assert_allclose((found.up @ found.down).numpy(), u[:, :4] * s[:4] @ vt[:4], rtol=0, atol=1e-12)
        np.testing.assert_allclose(energies(w, Metric()).numpy(), s**2, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_fisher(self, shape) -> None:
        w, rank = weight_of(shape), 5
        importance = torch.rand(shape[1], dtype=torch.float64)
        importance[2] = 0  # an input without any gradient
        statistics = LayerStatistics(shape, 10, torch.zeros(16), fisher=importance)
        found = low_rank(w, rank, metric_of("fisher", statistics, True))
        values = np.linalg.svd(w.numpy() * importance.sqrt().numpy(), compute_uv=False) ** 2
        weighted = ((w - found.up @ found.down) ** 2 * importance).sum()
        assert float(weighted) == pytest.approx(values[rank:].sum(), rel=1e-9)
        same = low_rank(w, rank, Metric(importance * 7))
        torch.testing.assert_close(same.up @ same.down, found.up @ found.down)
        even = low_rank(w, rank, Metric(torch.full((shape[1],), 0.3)))
        plain = low_rank(w, rank, Metric())
        torch.testing.assert_close(even.up @ even.down, plain.up @ plain.down)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("count", [60, 6])
    def test_both_sides(self, shape, count: int) -> None:
        w, rank, x = weight_of(shape), 4, inputs(shape[1], count)
        g = inputs(shape[0], count)
        statistics = statistics_of(x, g)
        found = low_rank(w, rank, metric_of("activation-fisher", statistics, False))
        h = (
            statistics.gradients
            + METHODS["activation-fisher"].damping
            * statistics.gradients.diagonal().mean()
            * torch.eye(shape[0]).double()
        )
        t, s = svd_root(h), svd_root(statistics.moment)
        values = np.linalg.svd(t @ w.numpy() @ s, compute_uv=False) ** 2
        error = np.linalg.norm(t @ (w - found.up @ found.down).numpy() @ s) ** 2
        assert error == pytest.approx(values[rank:].sum(), rel=1e-6, abs=1e-12 * values.sum())
        assert found.lost == pytest.approx(values[rank:].sum(), rel=1e-6, abs=1e-12 * values.sum())

    def test_no_other_approximation_of_that_rank_loses_less(self) -> None:
        w, x = weight_of((9, 14)), inputs(14)
        metric = metric_of("activation", statistics_of(x, torch.randn(60, 9).double()), False)
        best = low_rank(w, 4, metric)
        up, down = best.up.clone().requires_grad_(), best.down.clone().requires_grad_()
        metric.error(w - up @ down).backward()
        scale = best.lost + 1
        assert float(up.grad.abs().max()) < 1e-8 * scale and float(down.grad.abs().max()) < 1e-8 * scale
        for other in (Metric(), Metric(torch.rand(14).double())):
            factors = low_rank(w, 4, other)
            assert float(metric.error(w - factors.up @ factors.down)) > best.lost * 1.01

    def test_orthogonality_and_nesting(self) -> None:
        w, x = weight_of((9, 14)), inputs(14)
        moment = x.T @ x / len(x)
        first, whole = low_rank(w, 2, Metric(moment)), low_rank(w, 5, Metric(moment))
        rest = w - first.up @ first.down
        torch.testing.assert_close(rest @ moment @ first.down.T, torch.zeros(9, 2).double(), rtol=0, atol=1e-9)
        second = low_rank(rest, 3, Metric(moment))
        torch.testing.assert_close(first.up @ first.down + second.up @ second.down, whole.up @ whole.down)


class TestFullRank:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(("samples", "dead"), [(60, 0), (60, 4), (3, 0), (1, 0)])
    @pytest.mark.parametrize("solver", ["activation", "activation-fisher"])
    def test_gives_the_weight_whatever_the_moments(self, shape, samples: int, dead: int, solver: str) -> None:
        w = weight_of(shape)
        x, g = inputs(shape[1], samples, dead), inputs(shape[0], samples)
        found = low_rank(w, min(shape), metric_of(solver, statistics_of(x, g), True))
        torch.testing.assert_close(found.up @ found.down, w, rtol=0, atol=1e-8)
        lengths = found.up.norm(dim=0), found.down.norm(dim=1)
        torch.testing.assert_close(*lengths)

    def test_rank_beyond_the_samples_goes_to_the_rest_of_the_weight(self) -> None:
        w, x = weight_of((9, 14)), inputs(14, 3)
        found = low_rank(w, 6, Metric(x.T @ x / 3))
        product = found.up @ found.down
        torch.testing.assert_close(product @ x.T, w @ x.T)
        u = np.linalg.svd((w @ x.T).numpy())[0][:, :3]
        rest = w.numpy() - u @ u.T @ w.numpy()
        tail = np.linalg.svd(rest, compute_uv=False)[3:]
        assert float((w - product).square().sum()) == pytest.approx((tail**2).sum())

    @pytest.mark.parametrize("shape", SHAPES)
    def test_of_inputs_that_never_vary(self, shape) -> None:
        found = low_rank(weight_of(shape), 3, Metric(torch.zeros(shape[1], shape[1])))
        assert found.energy == found.lost == 0 and bool(found.up.isfinite().all())


def test_gradients_whose_moment_is_rounded_below_zero() -> None:
    """As sums in float32 of few samples may be: the least damping does not lift them, ten times as much does."""
    n, m = 12, 20
    weight, x, g = torch.randn(m, n).double(), torch.randn(100, n).double(), torch.randn(9, m).double()
    moment = g.T @ g / len(g)
    mean = float(moment.diagonal().mean())
    moment -= (
        3 * METHODS["activation-fisher"].damping * mean * torch.eye(m).double()
    )  # so is now the lowest of its eigenvalues
    statistics = LayerStatistics((m, n), 100, weight.flatten()[:16].float(), x.T @ x / 100, x.mean(0), moment)
    metric = metric_of("activation-fisher", statistics, True)
    expected = moment + 10 * METHODS["activation-fisher"].damping * mean * torch.eye(m).double()
    torch.testing.assert_close(metric.outputs, expected, rtol=0, atol=1e-9)
    found = low_rank(weight, 4, metric)
    error = metric.error(weight - found.up @ found.down)
    assert found.lost == pytest.approx(float(error), rel=1e-6) and 0 < found.lost < found.energy
