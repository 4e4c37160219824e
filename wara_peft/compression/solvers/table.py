"""Solvers by their names: what statistics each needs, and how it weighs the error of an approximation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..statistics.layer_statistics import LayerStatistics
from .dictionary import Dictionary, ksvd, one_shot
from .low_rank import Metric

DAMPING = 1e-6
"""Share of the mean diagonal of E[g gᵀ] that is added to it: outputs whose gradient vanished in the batches count
little, and not nothing. Where rounding of the sums is worse than that, it is ten times as much, and so on."""


@dataclass(frozen=True)
class Solver:
    """A way to weigh the error.

    Attributes:
        needs: kinds of statistics that it must have.
        metric: from a layer's statistics, and whether the bias makes up for the mean of the inputs.
        is_loss: whether its errors are estimates of one loss, and can be compared between layers as they are; others
            are compared as shares of ‖T W S‖².
        learn: makes a dictionary of a weight, numbers of atoms and of values, and a metric; None for two factors.
    """

    needs: tuple[str, ...]
    metric: Callable[[LayerStatistics, bool], Metric]
    is_loss: bool = False
    learn: Callable[[Tensor, int, int, Metric], Dictionary] | None = None

    @property
    def is_dictionary(self) -> bool:
        """Whether the result is a dictionary and sparse coefficients."""
        return self.learn is not None


def _by_inputs(statistics: LayerStatistics, compensates: bool) -> Metric:
    """E‖(W − Ŵ) x‖², or, when the bias makes up for the error of the mean, what is left of it: about the mean μ."""
    moment = cast(Tensor, statistics.moment)
    if not compensates:
        return Metric(moment)
    mean = cast(Tensor, statistics.mean).double()
    return Metric(moment.double() - torch.outer(mean, mean))


def _outputs(statistics: LayerStatistics) -> Tensor:
    moment = cast(Tensor, statistics.gradients).double()
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    scale = moment.diagonal().mean() * identity
    for power in range(7):  # up to all of the mean diagonal, which no rounding comes near to
        regular: Tensor = moment + DAMPING * 10**power * scale
        if not bool(torch.linalg.cholesky_ex(regular).info):
            break
    return regular


SOLVERS = {
    "svd": Solver((), lambda statistics, compensates: Metric()),
    "fisher": Solver(("fisher",), lambda statistics, compensates: Metric(statistics.fisher), is_loss=True),
    "activation": Solver(("inputs",), _by_inputs),
    "activation-fisher": Solver(
        ("inputs", "gradients"),
        lambda statistics, compensates: Metric(_by_inputs(statistics, compensates).inputs, _outputs(statistics)),
        is_loss=True,
    ),
    "dictionary": Solver(("inputs",), _by_inputs, learn=ksvd),
    "dictionary-oneshot": Solver(("inputs",), _by_inputs, learn=one_shot),
}
"""By name:

- `svd`: ‖W − Ŵ‖²_F.
- `fisher`: Σ_ij F_j (W − Ŵ)²_ij with F_j = Σ_i (∂loss/∂W_ij)²; Hsu et al. (FWSVD), arXiv 2207.00112.
- `activation`: E‖(W − Ŵ) x‖², about the mean where the bias makes up for that; SVD-LLM, arXiv 2403.07378.
- `activation-fisher`: E‖gᵀ (W − Ŵ) x‖² with inputs x and output gradients g taken as independent, as K-FAC does.
- `dictionary`, `dictionary-oneshot`: as `activation`, by a dictionary; see `dictionary.py`.
"""
