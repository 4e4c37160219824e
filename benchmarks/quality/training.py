"""One training loop for every method and every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Rows = dict[str, Tensor]
"""Tensors of one length (N, …), which the model takes as keyword arguments."""

WARMUP_SHARE = 0.1


@dataclass
class Problem:
    """A task at one seed, before a method has touched it.

    Attributes:
        model: the base with its fresh head. Called with `Rows` it returns an object with `loss`.
        targets: ends of the names of the layers to adapt.
        head: names of the modules that train in full beside any adapter.
        splits: rows to "train", "validation" and "test".
        batch_size, steps: of the training.
        score: the metric of a model on rows.
        seed: of first values and of the order of batches.
        grid: what `form="grid"` must be told of the tokens, where the model does not tell it.
        further: measures more of a trained model than `score`; for the seeds that are reported.
    """

    model: nn.Module
    targets: list[str]
    head: list[str]
    splits: dict[str, Rows]
    batch_size: int
    steps: int
    score: Callable[[nn.Module, Rows], float]
    seed: int
    grid: dict[str, Any] = field(default_factory=dict)
    further: Callable[[nn.Module], dict[str, float]] | None = None

    def batches(self) -> Iterator[Rows]:
        """The batches of the training, in an order that the seed alone decides."""
        rows = self.splits["train"]
        number = len(next(iter(rows.values())))
        generator = torch.Generator().manual_seed(self.seed)
        left = self.steps
        while left:
            order = torch.randperm(number, generator=generator)
            for part in order.split(self.batch_size)[:left]:
                left -= 1
                yield {name: tensor[part] for name, tensor in rows.items()}


def nothing(step: int) -> None:
    """What a method without a schedule does after a step."""


@dataclass
class Built:
    """What a method made of a problem's model.

    Attributes:
        model: to be trained where it requires gradients.
        parameters: trained numbers without those of the head.
        after_step: called with the number of each step, from 0, after the optimizer's and with gradients still there.
    """

    model: nn.Module
    parameters: int
    after_step: Callable[[int], object] = nothing


def trained_parameters(model: nn.Module, head: list[str]) -> int:
    """Numbers that train, without those of modules of these names."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not set(head) & set(name.split("."))
    )


def train(problem: Problem, built: Built, rate: float) -> bool:
    """Train with AdamW, a warm-up and a linear decay; whether the loss stayed finite, and the training ran to its end.

    Where nothing requires gradients there is nothing to do.
    """
    parameters = [parameter for parameter in built.model.parameters() if parameter.requires_grad]
    if not parameters:
        return True
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    warmup = max(1, round(WARMUP_SHARE * problem.steps))

    def factor(step: int) -> float:
        return min((step + 1) / (warmup + 1), (problem.steps - step) / (problem.steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    built.model.train()
    for step, batch in enumerate(problem.batches()):
        loss = built.model(**batch).loss
        if not math.isfinite(loss.item()):
            return False
        loss.backward()
        optimizer.step()
        built.after_step(step)
        optimizer.zero_grad()
        schedule.step()
    return True


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Rows, batch_size: int = 100) -> float:
    """Mean of the model's loss over rows."""
    model.eval()
    number = len(next(iter(rows.values())))
    total = 0.0
    for part in torch.arange(number).split(batch_size):
        total += len(part) * model(**{name: tensor[part] for name, tensor in rows.items()}).loss.item()
    return total / number


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows, batch_size: int = 100) -> float:
    """Share of the rows whose largest logit is at their label."""
    model.eval()
    labels = rows["labels"]
    right = 0
    for part in torch.arange(len(labels)).split(batch_size):
        logits = model(**{name: tensor[part] for name, tensor in rows.items()}).logits
        right += int((logits.argmax(1) == labels[part]).sum())
    return right / len(labels)
