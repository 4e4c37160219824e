"""Training of linear layers as dense bases with sparse coefficients, by gradients of dense weights."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...arguments import check_argument
from ...factorized.dense_sparse_linear import DenseSparseLinear, StraightThroughLinear
from ..replacement import replace_everywhere, replace_targets
from ..report import Factorization
from ..solvers.dictionary import ITERATIONS, Dictionary, ksvd
from ..solvers.low_rank import Metric
from ..targets import check_base, linear_targets, weight_of
from .callback import TrainingMethod


@torch.no_grad()
def dense_sparse(
    weight: Tensor, block: int, atoms: int, nonzeros: int, iterations: int = ITERATIONS
) -> DenseSparseLinear:
    """Make a layer without a bias from a weight, by K-SVD of the columns of each block of rows.

    Args:
        weight: W, (m, n).
        block: p, the number of rows of a block, a divisor of m.
        atoms: k, at most n.
        nonzeros: s, at most k.
        iterations: iterations of K-SVD.

    Raises:
        ValueError: an argument is out of its range, or the layer would have as many numbers as the weight.
    """
    check_argument("dense_sparse(weight, block, atoms, nonzeros)", "weight", weight, "a torch.Tensor")
    m, n = weight.shape
    layer = DenseSparseLinear(n, m, block, atoms, nonzeros, False, weight.device, weight.dtype)
    numbers = layer.bases.numel() + layer.values.numel()
    if atoms > n or numbers >= m * n:
        raise ValueError(
            f"block={block}, atoms={atoms} and nonzeros={nonzeros} take {numbers} numbers, and the weight "
            f"{tuple(weight.shape)} has {m * n}. Take larger blocks, and fewer atoms (at most {n}) or values."
        )
    for index, rows in enumerate(torch.split(weight.detach(), block)):
        set_dictionary(layer, index, ksvd(rows.T, atoms, nonzeros, Metric(), iterations))
    return layer


def set_dictionary(layer: DenseSparseLinear, index: int, found: Dictionary) -> None:
    """Set one block of a layer from a dictionary of its transpose: W_bᵀ ≈ C D, so W_b ≈ Dᵀ Cᵀ."""
    layer.set_block(index, found.atoms.T.to(layer.bases.dtype), found.places, found.values)


@torch.no_grad()
def refresh(layer: StraightThroughLinear, iterations: int = 1) -> None:
    """Fit the factors of a layer to its present weight. K-SVD starts with the bases that they have."""
    factors = layer.factors
    for index, rows in enumerate(torch.split(layer.weight.detach(), factors.block)):
        found = ksvd(rows.T, factors.atoms, factors.nonzeros, Metric(), iterations, factors.bases[index].T)
        set_dictionary(factors, index, found)


def straight_through(
    model: nn.Module,
    block: int,
    atoms: int,
    nonzeros: int,
    target_modules: str | list[str] | None = None,
) -> Factorization:
    """Replace linear layers of a model, in place, by `StraightThroughLinear` layers.

    Such a layer computes with its factorisation, and its gradients go to a dense weight.

    Args:
        model: any module that contains linear layers.
        block, atoms, nonzeros: p, k and s of `DenseSparseLinear`.
        target_modules: as in PEFT; None means all linear layers but the output layer or classifier of a model of
            transformers.

    Returns:
        A report of the layers that were replaced, with s as their rank, and of those that were left. Its
        `parameters_after` counts the model after `StraightThroughFactorizer.finish`: training needs more.

    Raises:
        ValueError: p, k and s do not fit a layer, which the message names; or `factorize` would raise it.
    """
    check_argument("straight_through(model, block, atoms, nonzeros)", "model", model, "an nn.Module")
    check_base(model)

    def make(layer: nn.Linear | Conv1D) -> nn.Module:
        weight = weight_of(layer)
        return StraightThroughLinear(weight, layer.bias, dense_sparse(weight, block, atoms, nonzeros))

    done = replace_targets(model, linear_targets(model, target_modules), make, attrgetter("factors.nonzeros"))
    kept_while_training = sum(layer.weight.numel() for layer in _layers(model))
    return replace(done, parameters_after=done.parameters_after - kept_while_training)


def _layers(model: nn.Module) -> list[StraightThroughLinear]:
    return [module for module in model.modules() if isinstance(module, StraightThroughLinear)]


class StraightThroughFactorizer(TrainingMethod):
    """Fits the factors of `StraightThroughLinear` layers to their weights every few steps of a training.

    At the end only the factors are kept. After DSFormer, arXiv 2312.13211: gradients go straight through to dense
    weights, and the places of coefficients follow these. Period and iterations are our choice. Call `start(model)`,
    `after_step(step)` after each step of the optimizer, and `finish()`; or give this object to transformers' `Trainer`
    as a callback.

    Args:
        period: steps between two fits.
        iterations: iterations of K-SVD in each fit, which starts with the present bases.

    Raises:
        ValueError: an argument is less than 1. `start` raises it for a model without such layers.
    """

    def __init__(self, period: int = 10, iterations: int = 1) -> None:
        for name, value in (("period", period), ("iterations", iterations)):
            check_argument("StraightThroughFactorizer(period, iterations)", name, value, "an int")
            if value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1.")
        self.period, self.iterations = period, iterations

    def start(self, model: nn.Module) -> None:
        """Begin to train a model."""
        check_base(model)
        if not _layers(model):
            raise ValueError("The model has no StraightThroughLinear; call straight_through(model, ...) first.")
        self._model = model

    def after_step(self, step: int) -> None:
        """Fit all factors if `step`, counted from 1, is a multiple of `period`."""
        if step % self.period == 0:
            for layer in _layers(self._started()):
                refresh(layer, self.iterations)

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the layers, in place, by their `DenseSparseLinear` factors, which compute the same."""
        # The factors go on training if the dense weight did.
        made: dict[nn.Module, nn.Module] = {}
        for layer in _layers(self._started()):
            factors = layer.factors.requires_grad_(layer.weight.requires_grad)
            factors.bias = layer.bias
            made[layer] = factors
        replace_everywhere(self._started(), made)
        self._model = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `Trainer` raises `global_step` after this event.
        self.after_step(state.global_step + 1)
