"""How train_low_rank.py trains: a dense model, and five ways to one of fewer parameters in its linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from low_rank_tasks import Batch, Task
from torch import Tensor, nn

from wara_peft.compression import (
    SVD,
    OrderedLowRankLinear,
    OrderedRankTraining,
    TrainedRankPruning,
    compress,
    factorize,
    low_rank_plus_sparse,
    ordered_low_rank,
)
from wara_peft.compression.training.ordered import cut_rank

WARM_UP, LAST = 0.1, 0.5
"""Shares of the steps: until the full rate is reached, and until no layer has more parameters than it may."""
CUTS = 9
"""How often Maestro cuts, and by the same factor each time."""
PENALTY = 1e-3
"""Maestro's λ: of 1e-5, 1e-4 and 1e-3 the one that did best in both tasks, on a seed of the learning rates' choice."""
PERIOD = 5
"""Steps between two truncations of TRP, as in its published script."""


class Dense:
    """Trains a model as it is. The others say what they do before, within and after its steps.

    Args:
        task: whose layers and rank are meant.
        model: a new one, which is converted in place.
        steps: of the whole training.

    Attributes:
        dense: numbers of the layers' weights in the dense model, Σ m n.
        allowed: those in the end, r Σ (m + n).
    """

    def __init__(self, task: Task, model: nn.Module, steps: int) -> None:
        self.task, self.model, self.steps = task, model, steps
        shapes = [layer.weight.shape for _, layer in self.targets()]
        self.dense = sum(m * n for m, n in shapes)
        self.sides = sum(m + n for m, n in shapes)
        self.allowed = task.rank * self.sides
        self.convert()

    def targets(self) -> list[tuple[str, nn.Module]]:
        """The layers that are to be of low rank, whatever they are now."""
        return [(name, layer) for name, layer in self.model.named_modules() if name.split(".")[-1] in self.task.layers]

    def convert(self) -> None:
        """Before the first step."""

    def before_forward(self, step: int) -> None: ...

    def after_backward(self) -> None:
        """Between clipping and the optimizer's step."""

    def after_step(self, done: int, optimizer: torch.optim.Optimizer) -> None:
        """When so many steps are done; may put other parameters in the place of some."""

    def finish(self) -> None:
        """After the last step."""

    @property
    def kept_beside(self) -> int:
        """Bytes that a step holds and a plain one does not."""
        return 0


class LowRank(Dense):
    """U V in each layer, from the first step on."""

    def convert(self) -> None:
        factorize(self.model, self.task.rank, "random", self.task.layers)


class SLTrain(Dense):
    """U V of a lower rank, and a sparse part with the parameters that this leaves: some 3 % of the entries."""

    def convert(self) -> None:
        given_up = max(1, round(0.03 * self.dense / self.sides))
        density = given_up * self.sides / self.dense
        low_rank_plus_sparse(self.model, self.task.rank - given_up, density, self.task.layers)


class Maestro(Dense):
    """Full rank at first, ordered, and cut some times: to what is allowed in the end when half of the steps are done.

    Maestro keeps ‖V[b:]‖ ‖U[:, b:]‖ ≥ ε, with an ε near zero, and has as many parameters as come of it. Here these are
    given, so the rule is relative to the same of the whole layer, and ε is what leaves so many.
    """

    def convert(self) -> None:
        ordered_low_rank(self.model, target_modules=self.task.layers)
        self.training = OrderedRankTraining(penalty=PENALTY)
        self.training.start(self.model)

    def before_forward(self, step: int) -> None:
        self.training.before_forward(step)

    def after_backward(self) -> None:
        self.training.after_backward()

    def after_step(self, done: int, optimizer: torch.optim.Optimizer) -> None:
        cuts = [round(self.steps * LAST * part / CUTS) for part in range(1, CUTS + 1)]
        if done in cuts:
            layers = list(self.training.layers.values())
            full = sum(min(layer.weight.shape) * sum(layer.weight.shape) for layer in layers)
            left = full * (self.allowed / full) ** ((cuts.index(done) + 1) / CUTS)
            for layer, rank in zip(layers, ranks_within(layers, left), strict=True):
                cut_rank(layer, rank, optimizer)

    def finish(self) -> None:
        self.training.finish()


@torch.no_grad()
def ranks_within(layers: Sequence[OrderedLowRankLinear], parameters: float) -> list[int]:
    """The most components, of the greatest share of ‖V‖ ‖U‖ of their layer from them on, with no more weights."""
    worth: list[tuple[float, int]] = []
    for index, layer in enumerate(layers):
        rows, columns = layer.down.weight.square().sum(1), layer.up.weight.square().sum(0)
        tails = (rows.flip(0).cumsum(0) * columns.flip(0).cumsum(0)).flip(0).sqrt()
        worth += [(share, index) for share in (tails / tails[0]).tolist()]
    ranks = [0] * len(layers)
    for _, index in sorted(worth, reverse=True):  # the first component of each layer comes first, with a share of 1
        parameters -= sum(layers[index].weight.shape)
        if parameters < 0:
            break
        ranks[index] += 1
    return ranks


class Cut(Dense):
    """Dense for half of the steps, then cut by the SVD to what is allowed, and trained on."""

    def after_step(self, done: int, optimizer: torch.optim.Optimizer) -> None:
        if done == round(self.steps * LAST):
            biases = sum(layer.bias.numel() for _, layer in self.targets() if layer.bias is not None)
            names = [name for name, _ in self.targets()]
            compress(self.model, SVD(self.allowed + biases, target_modules=names), show_progress_bar=False)


class TRP(Cut):
    """The same, and before that truncated in training by energy, with the nuclear norm's sub-gradient."""

    def convert(self) -> None:
        self.pruning: TrainedRankPruning | None = TrainedRankPruning(period=PERIOD, target_modules=self.task.layers)
        self.pruning.start(self.model)

    def before_forward(self, step: int) -> None:
        if self.pruning:
            self.pruning.before_forward(step)

    def after_backward(self) -> None:
        if self.pruning:
            self.pruning.after_backward()

    def after_step(self, done: int, optimizer: torch.optim.Optimizer) -> None:
        if done == round(self.steps * LAST):
            self.pruning = None
        super().after_step(done, optimizer)

    @property
    def kept_beside(self) -> int:
        """U Vᵀ of each weight, in every fifth step until its backward is done."""
        return sum(layer.weight.nbytes for _, layer in self.targets()) if self.pruning else 0


METHODS: dict[str, type[Dense]] = {
    "dense": Dense,
    "low-rank": LowRank,
    "SLTrain": SLTrain,
    "Maestro": Maestro,
    "TRP": TRP,
    "SVD": Cut,
}


def train_step(method: Dense, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> None:
    method.before_forward(step)
    method.model(**batch).loss.backward()
    nn.utils.clip_grad_norm_(method.model.parameters(), 1.0)
    method.after_backward()
    optimizer.step()
    optimizer.zero_grad()


def train(method: Dense, rate: float, seed: int) -> None:
    """Train by AdamW without weight decay, all but `finish`; the rate rises for a tenth of the steps, then falls."""
    model, steps = method.model.train(), method.steps
    optimizer = optimizer_for(model)
    warm_up = max(1, round(WARM_UP * steps))
    for step, batch in zip(range(steps), method.task.batches(seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
        train_step(method, optimizer, batch, step)
        method.after_step(step + 1, optimizer)
        optimizer = optimizer_for(model, optimizer)


def optimizer_for(model: nn.Module, before: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    """The optimizer that there is, or where parameters have been replaced a new one with the moments of the others."""
    parameters: list[Tensor] = list(model.parameters())
    if before is not None:
        known = before.param_groups[0]["params"]
        if len(known) == len(parameters) and all(a is b for a, b in zip(known, parameters, strict=True)):
            return before
    made = torch.optim.AdamW(parameters, weight_decay=0.0)
    if before is not None:
        made.state.update({p: before.state[p] for p in parameters if p in before.state})
    return made
