"""Task (d): a small convolutional network that knows ten clean digits meets images with other statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from quality.tasks.digits import images
from quality.tasks.pretrained import cached
from quality.training import Problem, accuracy

CLASSES = 10
PRETRAININGS = 3
PRETRAINING_STEPS, PRETRAINING_RATE = 300, 3e-3
PER_CLASS = 10
VALIDATION, TEST = 200, 500


class ConvNet(nn.Module):
    """Four convolutions, two of which halve the image, a mean over what is left of it, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)]
        self.stem = nn.Conv2d(*sizes[0][:2], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.GroupNorm(4, into), "conv": nn.Conv2d(into, out, 3, stride, padding=1)})
            for into, out, stride in sizes[1:]
        )
        self.classifier = nn.Linear(sizes[-1][1], CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        states = self.stem(pixel_values)
        for block in self.blocks:
            states = block["conv"](nn.functional.relu(block["norm"](states)))
        logits = self.classifier(nn.functional.relu(states).mean((2, 3)))
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@lru_cache
def halves() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """All digits, mixed, in two halves: for the pretraining, and for what follows."""
    (low, low_labels), (high, high_labels) = images(0, 4), images(5, 9)
    pixels, labels = torch.cat([low, high]), torch.cat([low_labels, high_labels + 5])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    middle = len(order) // 3
    return (pixels[order[:middle]], labels[order[:middle]]), (pixels[order[middle:]], labels[order[middle:]])


def pretrain(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = ConvNet()
    pixels, labels = halves()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE)
    for _ in range(PRETRAINING_STEPS):
        rows = torch.randint(len(labels), (64,))
        model(pixels[rows], labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@lru_cache(maxsize=PRETRAININGS)
def pretrained_network(seed: int) -> nn.Module:
    model = ConvNet()
    model.load_state_dict(cached(f"conv_{seed}", partial(pretrain, seed)))
    return model


def lit(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Inverted, with half the contrast, on a slope of light."""
    slope = torch.linspace(-1, 1, pixels.shape[-1])
    return -0.5 * pixels + 0.7 * slope + 0.3


def blurred(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The mean of 5 × 5 pixels, with noise."""
    means = nn.functional.avg_pool2d(nn.functional.pad(pixels, [2] * 4, value=-1.0), 5, stride=1)
    return means + 0.3 * torch.randn(pixels.shape, generator=generator)


def edges(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Differences of neighbours along the row."""
    return 2 * (pixels - pixels.roll(1, dims=3))


SHIFTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"lit": lit, "blurred": blurred, "edges": edges}


@dataclass(frozen=True)
class Convolutions:
    """Args: one of `SHIFTS`, training steps."""

    shift: str
    steps: int = 100
    metric = "accuracy"
    higher_is_better = True
    layers = "conv"
    has_grid = False
    attention = ""

    @property
    def name(self) -> str:
        return f"conv/{self.shift}"

    def problem(self, seed: int) -> Problem:
        model = copy.deepcopy(pretrained_network(seed % PRETRAININGS))
        generator = torch.Generator().manual_seed(seed)
        pixels, labels = halves()[1]
        pixels = SHIFTS[self.shift](pixels, generator)
        order = torch.randperm(len(labels), generator=generator)
        pool, held_out = order[VALIDATION + TEST :], order[: VALIDATION + TEST]
        chosen = torch.cat([pool[labels[pool] == label][:PER_CLASS] for label in range(CLASSES)])
        parts = {"train": chosen, "validation": held_out[:VALIDATION], "test": held_out[VALIDATION:]}
        splits = {name: {"pixel_values": pixels[part], "labels": labels[part]} for name, part in parts.items()}
        # The head keeps what it knows: the classes are the same.
        return Problem(model, ["conv"], ["classifier"], splits, 20, self.steps, accuracy, seed)


TASKS = [Convolutions(shift) for shift in SHIFTS]
