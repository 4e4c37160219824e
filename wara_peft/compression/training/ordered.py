"""Training that finds the rank of each layer: by ordered dropout, a penalty on tails of components, and cutting them.

The components of a low-rank layer U V are ordered: component i is column i of U with row i of V. The tail from b on is
V[b:] and U[:, b:], the components after the first b.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ...arguments import check_argument, check_whole_number
from ...calibration.processes import processes
from ...compiled import on_plain_model
from ...factorized.low_rank_linear import factorize_linear
from ...factorized.ordered import OrderedLowRankLinear
from ...linear_algebra.tails import group_lasso, moments_of, prefix_above_threshold, tail_sums
from ..replacement import replace_everywhere, replace_targets
from ..report import Factorization
from ..targets import check_base, linear_targets, weight_of
from .callback import TrainingMethod


@on_plain_model
def ordered_low_rank(
    model: nn.Module, rank: int | None = None, target_modules: str | list[str] | None = None
) -> Factorization:
    """Replace linear layers of a model, in place, by low-rank layers with ordered components.

    The factors come from the SVD, U√Σ and √Σ Vᵀ, so at full rank the model computes the same as before. Train it with
    `OrderedRankTraining`. After Horváth et al., "Maestro", arXiv 2308.14929.

    Args:
        model: any module without adapters, trained or not.
        rank: the highest rank that a layer gets; None is full rank, at which a layer has more parameters than the
            dense layer until it is cut.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all
            linear layers but the output layer or classifier of a model of transformers.

    Raises:
        ValueError: `rank` is below 1, a target matches nothing, or a layer cannot be factorised.
    """
    check_argument("ordered_low_rank(model, rank)", "model", model, "an nn.Module")
    if rank is not None:
        check_whole_number("rank", rank)
    check_base(model)

    def make(layer: nn.Linear | Conv1D) -> nn.Module:
        most = min(weight_of(layer).shape)
        low_rank: Any = factorize_linear(layer, most if rank is None else min(rank, most))
        # The two classes have the same parameters, so the new layer only changes its class.
        low_rank.__class__ = OrderedLowRankLinear
        return cast(OrderedLowRankLinear, low_rank)

    return replace_targets(model, linear_targets(model, target_modules), make)


class OrderedRankTraining(TrainingMethod):
    """Orders the components of a model's layers by importance while it trains, and cuts components of no use.

    Each step draws one pair of a layer and a rank b, uniformly from all pairs. In this step that layer computes with
    its first b components, and all other layers compute in full. The penalty λ Σ_layers Σ_b (‖V[b:]‖_F + ‖U[:, b:]‖_F)
    acts through its gradient, which is added to that of the loss. At the end of each epoch a layer keeps the
    components b with ‖V[b:]‖ · ‖U[:, b:]‖ ≥ ε, and at least one: parameters and the optimizer's moments are cut, in
    place. At the end of the training, layers whose rank is at or above the break-even become dense. If the model has
    norms with running statistics, measure these again after that.

    After Horváth et al., "Maestro", arXiv 2308.14929. Maestro goes through a shuffled list of all pairs. Here draws
    are independent and depend only on the seed and the step, so resuming needs no state; the shapes in the checkpoint
    tell the ranks.

    Use it as a callback of transformers' `Trainer`:

        >>> ordered_low_rank(model)  # doctest: +SKIP
        >>> Trainer(model, args, callbacks=[OrderedRankTraining(penalty=1e-4)], ...)  # doctest: +SKIP

    Or use it in a training loop:

        >>> training = OrderedRankTraining(penalty=1e-4)  # doctest: +SKIP
        >>> training.start(model)  # doctest: +SKIP
        >>> for step, batch in enumerate(batches):  # doctest: +SKIP
        ...     training.before_forward(step)
        ...     model(**batch).loss.backward()
        ...     training.after_backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> training.shrink(optimizer)  # between epochs  # doctest: +SKIP
        >>> training.finish()  # doctest: +SKIP

    With several processes, shapes stay the same until the end, because DDP's reducer of gradients relies on them.
    Components that are cut become zero then, and stay zero.

    Args:
        penalty: λ. The published scripts have 1e-6, the code 5e-3.
        threshold: ε.
        seed: seed of the draws.

    Raises:
        ValueError: λ or ε is negative. `start` refuses a model without ordered layers, with sharded layers or with
            adapters. `shrink` refuses an optimizer whose state it cannot cut.
    """

    adds_to_gradients = True

    def __init__(self, penalty: float, threshold: float = 1e-5, seed: int = 0) -> None:
        for name, value in (("penalty", penalty), ("threshold", threshold)):
            check_argument("OrderedRankTraining(penalty, threshold)", name, value, "a number")
            if value < 0:
                raise ValueError(f"{name}={value!r} must be at least 0.")
        self.factor, self.threshold, self.seed = penalty, threshold, seed
        self._ranks: dict[str, int] = {}
        """Number of components of each layer that are not zero. Ranks are drawn from these."""

    def start(self, model: nn.Module) -> None:
        """Begin to train a model."""
        check_base(model)
        layers = _layers(model)
        if not layers:
            raise ValueError("The model has no ordered layer; call ordered_low_rank(model) first.")
        for name, layer in layers.items():
            if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
                raise ValueError(f"{name!r} is sharded, as by FSDP, and its components are not. Train with DDP.")
        self._model = model
        self._ranks = {name: _alive(layer) for name, layer in layers.items()}

    @property
    def layers(self) -> dict[str, OrderedLowRankLinear]:
        """The ordered layers of the model, by name."""
        return _layers(self._started())

    def before_forward(self, step: int) -> tuple[str, int]:
        """Draw a layer and a rank for the forwards of this step, and return them for logging."""
        layers = self.layers
        ends = list(accumulate(min(self._ranks[name], layer.rank) for name, layer in layers.items()))
        # All processes draw the same pair, as they know the same ranks. The factor keeps sequences of different seeds
        # apart for a million steps.
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + step)
        drawn = int(torch.randint(ends[-1], (), generator=generator))
        index = bisect_right(ends, drawn)
        for layer in layers.values():
            layer.limit = None
        name, layer = list(layers.items())[index]
        layer.limit = ends[index] - drawn
        return name, layer.limit

    def penalty(self) -> Tensor:
        """Give λ Σ_layers Σ_b (‖V[b:]‖_F + ‖U[:, b:]‖_F), differentiable, for loops that add it to the loss."""
        return self.factor * group_lasso(tail for layer in self.layers.values() for tail in _tails(layer))

    def after_backward(self) -> None:
        """Add the penalty's gradient. Call it after backward (and clipping), before the optimizer's step."""
        if not self.factor:
            return
        parameters = [
            parameter
            for layer in self.layers.values()
            for parameter in (layer.down.weight, layer.up.weight)
            if parameter.requires_grad
        ]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.penalty(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    @torch.no_grad()
    def shrink(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Cut components below the threshold ε and the optimizer's moments of them. Returns the new ranks by name."""
        kept = {
            name: max(1, prefix_above_threshold(*_tails(layer), self.threshold)) for name, layer in self.layers.items()
        }
        if optimizer is not None:
            # All layers are checked before the first is cut.
            for name, layer in self.layers.items():
                _check_state(name, layer, optimizer)
        for name, layer in self.layers.items():
            if kept[name] == layer.rank:
                continue
            if processes() > 1:
                _empty(layer, kept[name], optimizer)
            else:
                cut_rank(layer, kept[name], optimizer)
        self._ranks = kept
        return kept

    def finish(self) -> dict[str, int | None]:
        """Cut components that are zero. Layers become dense or `LowRankLinear`, whichever has fewer parameters.

        Returns:
            The rank of each layer by name; None is dense.
        """
        ranks: dict[str, int | None] = {}
        dense: dict[nn.Module, nn.Module] = {}
        for name, layer in self.layers.items():
            layer.cut(_alive(layer))
            layer.settle()
            m, n = layer.out_features, layer.in_features
            ranks[name] = layer.rank if layer.rank * (m + n) < m * n else None
            if ranks[name] is None and layer not in dense:
                dense[layer] = layer.dense()
        replace_everywhere(self._started(), dense)
        self._model = None
        return ranks

    def arguments(self) -> dict[str, Any]:
        return {"penalty": self.factor, "threshold": self.threshold, "seed": self.seed}

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.shrink(optimizer)


@torch.no_grad()
def cut_rank(layer: OrderedLowRankLinear, rank: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Keep only a layer's first `rank` components and the optimizer's moments of them, in place.

    Raises:
        ValueError: the rank is less than 1, or the optimizer's state has a tensor of another shape than its parameter.
    """
    if optimizer is not None:
        _check_state("the layer", layer, optimizer)
        for parameter, dim in ((layer.down.weight, 0), (layer.up.weight, 1)):
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = value.narrow(dim, 0, min(rank, layer.rank)).clone()
    layer.cut(rank)


def _check_state(name: str, layer: OrderedLowRankLinear, optimizer: torch.optim.Optimizer) -> None:
    for parameter in (layer.down.weight, layer.up.weight):
        for key, value in optimizer.state.get(parameter, {}).items():
            # Adafactor, for example, keeps means over rows and over columns. A tensor of one number counts steps.
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"The optimizer keeps {key!r} of shape {tuple(value.shape)} for {name!r}, which cannot be cut "
                    f"with a parameter of shape {tuple(parameter.shape)}. Use AdamW, Adam or SGD."
                )


def _empty(layer: OrderedLowRankLinear, rank: int, optimizer: torch.optim.Optimizer | None) -> None:
    # With both factors and their moments at zero, neither gradients nor momentum bring a component back.
    for parameter, dim in ((layer.down.weight, 0), (layer.up.weight, 1)):
        for tensor in (parameter, *moments_of(optimizer, parameter)):
            tensor.narrow(dim, rank, layer.rank - rank).zero_()


@on_plain_model
def _layers(model: nn.Module) -> dict[str, OrderedLowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, OrderedLowRankLinear)}


def _alive(layer: OrderedLowRankLinear) -> int:
    """Give the number of components up to the last one that is not zero, and at least 1."""
    rows, columns = _tails(layer)
    return max(1, int((rows * columns > 0).sum()))


def _tails(layer: OrderedLowRankLinear) -> tuple[Tensor, Tensor]:
    """Give ‖V[b:]‖² and ‖U[:, b:]‖² for b = 0 … r − 1."""
    return tail_sums(layer.down.weight.square().sum(1)), tail_sums(layer.up.weight.square().sum(0))
