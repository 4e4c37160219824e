"""Training of linear layers as dense bases with sparse coefficients, by gradients of dense weights."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ...arguments import check_argument
from ...factorized.dense_sparse_linear import DenseSparseLinear
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


class StraightThroughLinear(nn.Module):
    """A linear layer that computes with a factorisation Ŵ of its weight W, and passes the gradient of Ŵ on to W.

    y = Ŵ x + b with Ŵ from `factors`, and ∂loss/∂W := ∂loss/∂Ŵ. The optimizer moves W. The factors get no gradient:
    each forward first fits them to W, if W has changed since they were fitted.

    Args:
        weight: W, (m, n).
        bias: b, (m,), or None.
        factors: the layer that has Ŵ, without a bias, fitted to W.

    Attributes:
        iterations: iterations of K-SVD in each fit, which starts with the present bases.
        fitted_to: two numbers that tell to which values of W the factors are fitted. A checkpoint has them too.
        name: what messages call the layer. `StraightThroughFactorizer.start` sets it.

    Raises:
        ValueError: a forward finds a weight that is not finite.
    """

    iterations = 1
    name = "a layer of no name"

    def __init__(self, weight: Tensor, bias: Tensor | None, factors: DenseSparseLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = factors.in_features, factors.out_features
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        self.bias: nn.Parameter | None = None if bias is None else nn.Parameter(bias.detach().clone())
        self.factors = factors.requires_grad_(False)
        self.fitted_to: Tensor
        self.register_buffer("fitted_to", self._mark())

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        self.fit()
        passed: Any = _StraightThrough.apply(self.weight, self.factors.weight)  # type: ignore[no-untyped-call]
        return functional.linear(input, passed, self.bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # K-SVD chooses by values
    @torch.no_grad()
    def fit(self) -> None:
        """Fit the factors to the present weight, unless they are."""
        # Values are compared, and not versions of the tensor: some optimizers write to `weight.data`, and activation
        # checkpointing runs a forward twice, which must not move the factors in between.
        mark = self._mark()
        if torch.equal(mark, self.fitted_to):
            return
        if not bool(mark.view(torch.float64).isfinite().all()):
            raise ValueError(
                f"{self.name!r} cannot be factorised: training has brought NaN or infinity into its weight. Begin "
                "again from an earlier checkpoint with a lower learning rate."
            )
        for index, rows in enumerate(torch.split(self.weight.detach(), self.factors.block)):
            start = self.factors.bases[index].T
            found = ksvd(rows.T, self.factors.atoms, self.factors.nonzeros, Metric(), self.iterations, start)
            set_dictionary(self.factors, index, found)
        self.fitted_to.copy_(mark)

    @torch.no_grad()
    def _mark(self) -> Tensor:
        weight = self.weight.detach()
        numbers = (weight.sum(dtype=torch.float64), torch.linalg.vector_norm(weight, dtype=torch.float64))
        # As bits of integers, which a change of the module's dtype leaves as they are.
        return torch.stack(numbers).view(torch.int64)


class _StraightThrough(torch.autograd.Function):
    """Returns `approximation`, and passes its gradient on to `weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, approximation: Tensor) -> Tensor:
        return approximation.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


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
    """Trains a model of `StraightThroughLinear` layers, and keeps only their factors at the end.

    After DSFormer, arXiv 2312.13211: gradients go straight through to dense weights, and each forward factorises these
    again, so bases, places and values follow them step by step. The iterations are our choice. Call `start(model)`
    before a training and `finish()` after it; or give this object to transformers' `Trainer` as a callback.

    Args:
        iterations: iterations of K-SVD in each forward after a change of the weight. It starts with the present bases.

    Raises:
        ValueError: `iterations` is less than 1. `start` refuses a model without such layers, or with sharded ones.
    """

    def __init__(self, iterations: int = 1) -> None:
        check_argument("StraightThroughFactorizer(iterations)", "iterations", iterations, "an int")
        if iterations < 1:
            raise ValueError(f"iterations={iterations!r} must be at least 1.")
        self.iterations = iterations

    def start(self, model: nn.Module) -> None:
        """Begin to train a model."""
        check_base(model)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, StraightThroughLinear)}
        if not layers:
            raise ValueError("The model has no StraightThroughLinear; call straight_through(model, ...) first.")
        for name, layer in layers.items():
            if isinstance(layer.weight, DTensor):
                raise ValueError(f"{name!r} is sharded, as by FSDP, and is factorised as a whole. Train with DDP.")
        for name, layer in layers.items():
            layer.name, layer.iterations = name, self.iterations
        self._model = model

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the layers, in place, by their `DenseSparseLinear` factors, fitted to the last weights."""
        # The factors go on training if the dense weight did.
        made: dict[nn.Module, nn.Module] = {}
        for layer in _layers(self._started()):
            layer.fit()
            factors = layer.factors.requires_grad_(layer.weight.requires_grad)
            factors.bias = layer.bias
            made[layer] = factors
        replace_everywhere(self._started(), made)
        self._model = None

    def arguments(self) -> dict[str, Any]:
        return {"iterations": self.iterations}
