"""Training that finds the rank of each layer: ordered dropout, a penalty on tails, and cutting these as it goes on."""

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
    """Replace linear layers of a model, in place, by low-rank ones with ordered components.

    Factors are those of the SVD, U√Σ and √Σ Vᵀ, so that at full rank the model computes what it did. Train it with
    `OrderedRankTraining`. After Horváth et al., "Maestro", arXiv 2308.14929.

    Args:
        model: any module, without adapters; of a model yet to be trained too.
        rank: of all layers, at most; None is full rank, which has more parameters than the dense layer until it is
            cut.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all
            linear layers but the output layer of a model of transformers.

    Raises:
        ValueError: a rank below 1, a target that matches nothing, or a layer that cannot be factorised.
    """
    check_argument("ordered_low_rank(model, rank)", "model", model, "an nn.Module")
    if rank is not None:
        check_whole_number("rank", rank)
    check_base(model)

    def make(layer: nn.Linear | Conv1D) -> nn.Module:
        most = min(weight_of(layer).shape)
        low_rank: Any = factorize_linear(layer, most if rank is None else min(rank, most))
        low_rank.__class__ = OrderedLowRankLinear
        return cast(OrderedLowRankLinear, low_rank)

    return replace_targets(model, linear_targets(model, target_modules), make)


class OrderedRankTraining(TrainingMethod):
    """Orders the components of a model's layers by importance while it trains, and cuts those of no use.

    Each step draws one of all pairs of a layer and a rank b, uniformly; that layer computes with its first b
    components, all others in full. λ Σ_layers Σ_b (‖V[b:]‖_F + ‖U[:, b:]‖_F) is added to the loss, by its gradient.
    At the end of each epoch a layer keeps its longest prefix with ‖V[b:]‖ · ‖U[:, b:]‖ ≥ ε, at least one component:
    parameters and the optimizer's moments are cut, in place. At the end of the training layers at or above the
    break-even become dense. Norms with running statistics want these measured anew after that.

    After Horváth et al., "Maestro", arXiv 2308.14929: draws are independent, and a function of the seed and the step,
    in place of a shuffled list of all pairs, so that resuming needs no state; the checkpoint's shapes tell the ranks.

    As a callback of transformers' `Trainer`:

        >>> ordered_low_rank(model)  # doctest: +SKIP
        >>> Trainer(model, args, callbacks=[OrderedRankTraining(penalty=1e-4)], ...)  # doctest: +SKIP

    In a loop of one's own:

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

    With several processes shapes stay until the end, as reducers of gradients know them, and what is to be cut becomes
    zero and stays so.

    Args:
        penalty: λ. The published scripts have 1e-6, the code 5e-3.
        threshold: ε.
        seed: of the draws.

    Raises:
        ValueError: λ or ε negative. `start` refuses a model without ordered layers, with sharded ones or with
            adapters; `shrink` an optimizer whose state it cannot cut.
    """

    adds_to_gradients = True

    def __init__(self, penalty: float, threshold: float = 1e-5, seed: int = 0) -> None:
        for name, value in (("penalty", penalty), ("threshold", threshold)):
            check_argument("OrderedRankTraining(penalty, threshold)", name, value, "a number")
            if value < 0:
                raise ValueError(f"{name}={value!r} must be at least 0.")
        self.factor, self.threshold, self.seed = penalty, threshold, seed
        self._ranks: dict[str, int] = {}
        """Components that are not zero, of which draws are made."""

    def start(self, model: nn.Module) -> None:
        """Begin with a model."""
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
        """By name."""
        return _layers(self._started())

    def before_forward(self, step: int) -> tuple[str, int]:
        """Draw a layer and a rank for the forwards of this step; returned for those who log."""
        layers = self.layers
        ends = list(accumulate(min(self._ranks[name], layer.rank) for name, layer in layers.items()))
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + step)
        drawn = int(torch.randint(ends[-1], (), generator=generator))
        index = bisect_right(ends, drawn)
        for layer in layers.values():
            layer.limit = None
        name, layer = list(layers.items())[index]
        layer.limit = ends[index] - drawn
        return name, layer.limit

    def penalty(self) -> Tensor:
        """λ Σ_layers Σ_b (‖V[b:]‖_F + ‖U[:, b:]‖_F), differentiable, for those who add it to a loss of their own."""
        return self.factor * group_lasso(tail for layer in self.layers.values() for tail in _tails(layer))

    def after_backward(self) -> None:
        """Add the penalty's gradient, between backward (and clipping) and the optimizer's step."""
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
        """Cut what is worth less than ε, with the optimizer's moments; returns the ranks that are kept."""
        kept = {
            name: max(1, prefix_above_threshold(*_tails(layer), self.threshold)) for name, layer in self.layers.items()
        }
        if optimizer is not None:
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
        """Cut components that are zero, and make dense where that takes no more parameters, which None stands for.

        The other layers are plain `LowRankLinear` then.
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

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.shrink(optimizer)


@torch.no_grad()
def cut_rank(layer: OrderedLowRankLinear, rank: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Keep a layer's first components alone, with the optimizer's moments of them, in place.

    Raises:
        ValueError: the rank is less than 1, or the optimizer keeps something of another shape.
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
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"The optimizer keeps {key!r} of shape {tuple(value.shape)} for {name!r}, which cannot be cut "
                    f"with a parameter of shape {tuple(parameter.shape)}. Use AdamW, Adam or SGD."
                )


def _empty(layer: OrderedLowRankLinear, rank: int, optimizer: torch.optim.Optimizer | None) -> None:
    for parameter, dim in ((layer.down.weight, 0), (layer.up.weight, 1)):
        for tensor in (parameter, *moments_of(optimizer, parameter)):
            tensor.narrow(dim, rank, layer.rank - rank).zero_()


@on_plain_model
def _layers(model: nn.Module) -> dict[str, OrderedLowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, OrderedLowRankLinear)}


def _alive(layer: OrderedLowRankLinear) -> int:
    """How many components there are up to the last one that is not zero, at least 1."""
    rows, columns = _tails(layer)
    return max(1, int((rows * columns > 0).sum()))


def _tails(layer: OrderedLowRankLinear) -> tuple[Tensor, Tensor]:
    """‖V[b:]‖² and ‖U[:, b:]‖² for b = 0 … r − 1."""
    return tail_sums(layer.down.weight.square().sum(1)), tail_sums(layer.up.weight.square().sum(0))
