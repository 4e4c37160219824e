"""The ways to compress a model: a small config for each.

The command line makes its options from these classes. It reads this file without its package, which would import
PyTorch, so this file imports nothing but Python's own modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Method:
    """What every way to compress a model has: a budget, and how it is spent. Pass one of the subclasses to `compress`.

    Args:
        budget: how much the targets may cost: a share of their cost as dense layers, such as 0.6; a number of
            parameters; or bytes as text, such as "48MB" or "1GiB". With allocation="cost" it is a share of that cost,
            or an int in its units. A mapping from full names of layers to ranks sets targets and ranks directly; a
            layer whose rank would save nothing stays dense.
        allocation: "uniform" gives all layers the same share of their dense cost. "greedy" gives unit after unit of
            rank to the layer where it gains most for its cost. The i-th unit gains σ_i² of T W S; see
            `solvers/low_rank.py`. If the method does not estimate the loss itself, σ_i² is divided by ‖T W S‖², and
            each layer first gets three quarters of its uniform rank. "cost" is greedy with `cost` in place of
            parameters. "depth" is for keys and values, which are its default targets: layers nearer to the input keep
            more, by the condition numbers κ of the weights from there to the top,
            d_ℓ ∝ 1 − (max log κ̃ − log κ̃_ℓ)/(max log κ̃ − min log κ̃)/2 with κ̃_ℓ = Π_{j≥ℓ} κ_j. The formula is
            LoRC's (arXiv 2410.03111), taken from a second-hand source.
        cost: for allocation="cost": "flops" (of the positions seen in calibration), "bytes", or a function of (name,
            m, n, rank or None for dense).
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all
            linear layers but the output layer or classifier of a model of transformers.
        compensate_bias: let the bias make up for the error at the mean input, if statistics have that mean. A layer
            without a bias gets one, whose parameters count.
    """

    solver: ClassVar[str]
    """Name of the method in reports, in saved models and on the command line."""

    budget: float | int | str | Mapping[str, int]
    allocation: Literal["uniform", "greedy", "cost", "depth"] = field(
        default="greedy", metadata={"help": "How the budget is shared among layers."}
    )
    cost: str | Callable[[str, int, int, int | None], float] = field(
        default="flops", metadata={"help": "What --allocation cost counts."}
    )
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Layers to compress, by ends of names; may be repeated."}
    )
    compensate_bias: bool = field(
        default=True, metadata={"help": "Let biases make up for the error at the mean input."}
    )


@dataclass(frozen=True)
class SVD(Method):
    """Minimises ‖W − Ŵ‖²_F for each layer. It needs no statistics; with them biases make up for the mean error."""

    solver = "svd"


@dataclass(frozen=True)
class Fisher(Method):
    """Minimises Σ_ij F_j (W − Ŵ)²_ij with F_j = Σ_i (∂loss/∂W_ij)², an estimate of the loss.

    Source: Hsu et al. (FWSVD), arXiv 2207.00112. It needs the statistics "fisher".
    """

    solver = "fisher"


@dataclass(frozen=True)
class Activation(Method):
    """Minimises E‖(W − Ŵ) x‖² over the inputs x of a layer, or E‖(W − Ŵ)(x − μ)‖² if the bias makes up for the mean.

    Source: SVD-LLM, arXiv 2403.07378. It needs the statistics "inputs".
    """

    solver = "activation"


@dataclass(frozen=True)
class ActivationFisher(Method):
    """Minimises E‖gᵀ (W − Ŵ) x‖², an estimate of the loss: inputs x and gradients g are taken as independent.

    It needs the statistics "inputs" and "gradients".

    Args:
        damping: share of the mean diagonal of E[g gᵀ] that is added to this diagonal. With it, outputs whose gradient
            vanished in the batches still count a little. If the sum is not positive definite, because rounding errors
            are larger, the share is raised tenfold, and again until it is.
    """

    solver = "activation-fisher"

    damping: float = field(
        default=1e-6, metadata={"help": "Share of the mean diagonal that is added to the moment of gradients."}
    )

    def __post_init__(self) -> None:
        is_number = isinstance(self.damping, Real) and not isinstance(self.damping, bool)
        if not (is_number and 0 < self.damping < math.inf):
            raise ValueError(f"damping={self.damping!r} must be a finite number above 0, as 1e-6.")


@dataclass(frozen=True)
class OneShotDictionary(Method):
    """Minimises the error of `Activation` with a dictionary of k atoms and k/2 values in each row of its coefficients.

    The values are chosen among principal components in one step. Bytes and parameters count the bits for the places
    of the values too. Source: ROCKET, arXiv 2602.11008. It needs the statistics "inputs".
    """

    solver = "dictionary-oneshot"


@dataclass(frozen=True)
class Dictionary(Method):
    """Minimises the error of `OneShotDictionary` by K-SVD with orthogonal matching pursuit, which takes longer.

    Source: CoSpaDi, arXiv 2509.22075. It needs the statistics "inputs".

    Args:
        iterations: of K-SVD; the error never grows.
    """

    solver = "dictionary"

    iterations: int = field(default=20, metadata={"help": "Iterations of K-SVD."})

    def __post_init__(self) -> None:
        if not isinstance(self.iterations, Integral) or isinstance(self.iterations, bool) or self.iterations < 0:
            raise ValueError(f"iterations={self.iterations!r} must be an int of at least 0.")


METHODS: dict[str, type[Method]] = {
    kind.solver: kind for kind in (SVD, Fisher, Activation, ActivationFisher, Dictionary, OneShotDictionary)
}
"""The methods that the command line knows, by their names."""
