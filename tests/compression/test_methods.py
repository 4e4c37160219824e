"""Methods of `compress`: what users pass, and how a further one is added."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch

from tests.compression.models import TwoLayers
from wara_peft.compression import SVD, Activation, ActivationFisher, Method, calibrate, compress
from wara_peft.compression.methods import METHODS
from wara_peft.compression.solvers.low_rank import Metric
from wara_peft.compression.solvers.table import SOLVERS, Solver, register_solver

QUIET = {"show_progress_bar": False}


def test_a_further_method_is_a_class_and_a_line() -> None:
    @dataclass(frozen=True)
    class Diagonal(Method):
        """Weighs inputs by a power of their mean squares."""

        solver = "diagonal"
        power: float = 1.0

    with pytest.raises(TypeError, match=r"method must be one of SVD, .* and is a Diagonal"):
        compress(TwoLayers(), Diagonal(0.5), **QUIET)
    try:
        register_solver(
            Diagonal, Solver(("inputs",), lambda method, entry, _: Metric(entry.moment.diagonal() ** method.power))
        )
        model, x = TwoLayers(), torch.randn(200, 12) * torch.arange(1, 13)
        weight, statistics = model.first.weight.detach().double(), calibrate(model, [x], **QUIET)
        report = compress(model, Diagonal({"first": 3}, power=0.5, compensate_bias=False), statistics, **QUIET)
        assert (report.solver, report.layers[0].rank) == ("diagonal", 3)
        root = x.double().square().mean(0) ** 0.25
        u, s, v = torch.linalg.svd(weight * root)
        expected = u[:, :3] @ torch.diag(s[:3]) @ v[:3] / root
        torch.testing.assert_close(model.first.weight.double(), expected, rtol=1e-4, atol=1e-5)
    finally:
        SOLVERS.pop(Diagonal, None)


@pytest.mark.parametrize("name", METHODS)
def test_names_and_help(name: str) -> None:
    method = METHODS[name]
    assert method(0.5).solver == name and method in SOLVERS
    assert all(field.metadata.get("help") for field in fields(method) if field.name != "budget")


def test_damping_is_the_methods_own() -> None:
    """A large one lets all outputs count alike, so the factors are those of `Activation`."""
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    found = []
    for method in (
        Activation({"first": 3}),
        ActivationFisher({"first": 3}),
        ActivationFisher({"first": 3}, damping=1e8),
    ):
        torch.manual_seed(1)
        model = TwoLayers()
        statistics = calibrate(model, [x], ["inputs", "gradients"], loss_fn=_loss, **QUIET)
        compress(model, method, statistics, **QUIET)
        found.append(model.first.weight)
    plain, weighed, damped = found
    torch.testing.assert_close(damped, plain, rtol=1e-4, atol=1e-5)
    assert (weighed - plain).norm() > 0.01 * plain.norm()


def _loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(x)[:, :3].square().sum()
    return loss


def test_svd_takes_no_field_of_others() -> None:
    with pytest.raises(TypeError, match="damping"):
        SVD(0.5, damping=0.1)


@pytest.mark.parametrize("statistics", ["uniform", 0.5, [1]])
def test_statistics_that_are_no_mapping(statistics: object) -> None:
    """The third argument was the allocation once, and callers may still pass it there."""
    model = TwoLayers()
    with pytest.raises(TypeError, match=r"^compress\(model, Activation\(.*: statistics must be a mapping, and is "):
        compress(model, SVD(0.6), statistics, **QUIET)
    assert type(model.first) is torch.nn.Linear


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_damping_is_a_finite_number_above_zero(damping: object) -> None:
    with pytest.raises(ValueError, match=r"^damping=.* must be a finite number above 0"):
        ActivationFisher(0.5, damping=damping)
