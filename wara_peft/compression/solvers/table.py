"""The table of solvers: which statistics each one needs, and how it weighs the error of an approximation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import methods
from ..methods import ActivationFisher, Method
from ..statistics.layer_statistics import LayerStatistics
from .dictionary import Dictionary, ksvd, one_shot
from .low_rank import Metric


@dataclass(frozen=True)
class Solver:
    """A way to factorise a weight: a metric, and whether the result is two factors or a dictionary.

    Attributes:
        needs: kinds of statistics that the solver needs.
        metric: makes the metric from the method, a layer's statistics, and whether the bias makes up for the mean
            error.
        is_loss: whether errors in the metric estimate the change of the model's loss. Then layers can be compared by
            their errors; otherwise they are compared by errors divided by ‖T W S‖².
        learn: makes a dictionary from the method, a weight, the numbers of atoms and of values in a row, and a metric.
            None means that the solver gives two factors.
    """

    needs: tuple[str, ...]
    metric: Callable[[Any, LayerStatistics, bool], Metric]
    is_loss: bool = False
    learn: Callable[[Any, Tensor, int, int, Metric], Dictionary] | None = None

    @property
    def is_dictionary(self) -> bool:
        """Whether the solver gives a dictionary and sparse coefficients."""
        return self.learn is not None


def _by_inputs(_: Method, statistics: LayerStatistics, compensates: bool) -> Metric:
    """Make the metric of E‖(W − Ŵ) x‖²; or of E‖(W − Ŵ)(x − μ)‖², which is left if the bias makes up for the mean."""
    moment = cast(Tensor, statistics.moment)
    if not compensates:
        return Metric(moment)
    mean = cast(Tensor, statistics.mean).double()
    return Metric(torch.addr(moment.double(), mean, mean, alpha=-1))


def _outputs(statistics: LayerStatistics, damping: float) -> Tensor:
    # `low_rank` takes the Cholesky factor of this matrix and solves with it, so it must be regular.
    moment = cast(Tensor, statistics.gradients).double()
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    scale = moment.diagonal().mean() * identity
    for power in range(7):  # up to all of the mean diagonal, which no rounding comes near to
        regular: Tensor = moment + damping * 10**power * scale
        if not bool(torch.linalg.cholesky_ex(regular).info):
            break
    return regular


def _by_inputs_and_gradients(method: ActivationFisher, statistics: LayerStatistics, compensates: bool) -> Metric:
    return Metric(_by_inputs(method, statistics, compensates).inputs, _outputs(statistics, method.damping))


SOLVERS: dict[type[Method], Solver] = {}
"""Maps the type of a method to what computes it. A further method is one class and one line; see `register_solver`."""


def register_solver(method: type[Method], solver: Solver) -> None:
    """Let `compress` take methods of a type."""
    SOLVERS[method] = solver


register_solver(methods.SVD, Solver((), lambda *_: Metric()))
register_solver(methods.Fisher, Solver(("fisher",), lambda _, entry, __: Metric(entry.fisher), is_loss=True))
register_solver(methods.Activation, Solver(("inputs",), _by_inputs))
register_solver(ActivationFisher, Solver(("inputs", "gradients"), _by_inputs_and_gradients, is_loss=True))
register_solver(
    methods.Dictionary,
    Solver(
        ("inputs",),
        _by_inputs,
        learn=lambda method, weight, k, s, metric: ksvd(weight, k, s, metric, method.iterations),
    ),
)
register_solver(methods.OneShotDictionary, Solver(("inputs",), _by_inputs, learn=lambda _, *given: one_shot(*given)))


def solver_of(method: Method) -> Solver:
    """Give what computes a method."""
    return SOLVERS[type(method)]
