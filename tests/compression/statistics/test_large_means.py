"""Inputs whose mean is far larger than their deviation: compression is the best there is, and its report is true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.compression.models import TwoLayers
from wara_peft.allocation.signals import input_covariances
from wara_peft.calibration.input_moments import Moments
from wara_peft.compression import calibrate, compress
from wara_peft.compression.methods import METHODS

QUIET = {"show_progress_bar": False}
RATIO = 1000.0


def inputs(batches: int = 4) -> Tensor:
    """Give batches of (100, 12) in float32, with deviations about 1 that differ by direction, and means of 1000."""
    scales = torch.logspace(0.5, -0.5, 12)
    mixing = torch.linalg.qr(torch.randn(12, 12)).Q
    return (torch.randn(batches, 100, 12) * scales) @ mixing + RATIO * torch.randn(12).sign()


def covariance(x: Tensor) -> Tensor:
    rows = x.double().flatten(0, -2)
    rows = rows - rows.mean(0)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("first_mean", [RATIO, 0.0])
def test_covariance(first_mean: float) -> None:
    x = inputs()
    x[0] += first_mean - RATIO  # the first batch may lie elsewhere
    entry = calibrate(TwoLayers(), x, **QUIET)["first"]
    found = entry.moment - torch.outer(entry.mean, entry.mean)
    torch.testing.assert_close(found, covariance(x), rtol=1e-5, atol=1e-5 * float(covariance(x).abs().max()))


@pytest.mark.parametrize("solver", ["activation", "dictionary-oneshot"])
def test_the_loss_is_the_least_and_the_report_says_it(solver: str) -> None:
    x = inputs()
    model = nn.Sequential(nn.Linear(12, 20))
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    report = compress(model, METHODS[solver]({"0": 4}), calibrate(model, x, **QUIET), **QUIET)
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(covariance(x))).square()
    rows = x.double().flatten(0, 1)
    wanted = rows @ weight.T + bias
    # The bias is in float32, and outputs are near 1000, so the mean error is not exactly zero.
    error = rows @ model[0].weight.double().T + model[0].bias.double() - wanted
    real = float(error.square().sum(1).mean() / values.sum())
    assert report.layers[0].lost == pytest.approx(real, rel=1e-4)
    if solver == "activation":
        assert real == pytest.approx(float(values[4:].sum() / values.sum()), rel=1e-4)


def test_covariances_for_the_allocation_of_ranks() -> None:
    model, x = TwoLayers(), inputs()
    ((_, found),) = input_covariances(model, {"first": (model.first, (20, 12))}, list(x), None)
    torch.testing.assert_close(found, covariance(x), rtol=1e-5, atol=1e-5 * float(covariance(x).abs().max()))


def test_sums_over_many_batches_lose_nothing() -> None:
    # In float32 a total above 2**24 takes in no more summands of 1.
    moments, layer = Moments(TwoLayers(), with_mean=True), nn.Linear(1, 1)
    moments.add(layer, (torch.full((1, 1), 2.0**12),))
    for _ in range(64):
        moments.add(layer, (torch.ones(1, 1),))
    expected = torch.tensor([[2.0**24 + 64, 2.0**12 + 64], [2.0**12 + 64, 65]], dtype=torch.float64)
    torch.testing.assert_close(moments.of_layers()[layer], expected, rtol=1e-14, atol=0)
