"""The table of solvers: which statistics each one needs, and how it weighs the error of an approximation."""

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
"""Share of the mean diagonal of E[g gᵀ] that is added to this diagonal.

With it, outputs whose gradient vanished in the batches still count a little. If the sum is not positive definite,
because rounding errors are larger, the share is raised tenfold, and again until it is.
"""


@dataclass(frozen=True)
class Solver:
    """A way to factorise a weight: a metric, and whether the result is two factors or a dictionary.

    Attributes:
        needs: kinds of statistics that the solver needs.
        metric: makes the metric from a layer's statistics and from whether the bias makes up for the mean error.
        is_loss: whether errors in the metric estimate the change of the model's loss. Then layers can be compared by
            their errors; otherwise they are compared by errors divided by ‖T W S‖².
        learn: makes a dictionary from a weight, the numbers of atoms and of values in a row, and a metric. None means
            that the solver gives two factors.
    """

    needs: tuple[str, ...]
    metric: Callable[[LayerStatistics, bool], Metric]
    is_loss: bool = False
    learn: Callable[[Tensor, int, int, Metric], Dictionary] | None = None

    @property
    def is_dictionary(self) -> bool:
        """Whether the solver gives a dictionary and sparse coefficients."""
        return self.learn is not None


def _by_inputs(statistics: LayerStatistics, compensates: bool) -> Metric:
    """Make the metric of E‖(W − Ŵ) x‖²; or of E‖(W − Ŵ)(x − μ)‖², which is left if the bias makes up for the mean."""
    moment = cast(Tensor, statistics.moment)
    if not compensates:
        return Metric(moment)
    mean = cast(Tensor, statistics.mean).double()
    return Metric(moment.double() - torch.outer(mean, mean))


def _outputs(statistics: LayerStatistics) -> Tensor:
    # `low_rank` takes the Cholesky factor of this matrix and solves with it, so it must be regular.
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
"""Maps names to solvers. Each solver minimises an error:

- `svd`: ‖W − Ŵ‖²_F.
- `fisher`: Σ_ij F_j (W − Ŵ)²_ij with F_j = Σ_i (∂loss/∂W_ij)²; Hsu et al. (FWSVD), arXiv 2207.00112.
- `activation`: E‖(W − Ŵ) x‖², with x − μ for x if the bias makes up for the mean; SVD-LLM, arXiv 2403.07378.
- `activation-fisher`: E‖gᵀ (W − Ŵ) x‖². Inputs x and output gradients g are taken as independent, as in K-FAC.
- `dictionary`, `dictionary-oneshot`: the error of `activation`, with a dictionary; see `dictionary.py`.
"""
