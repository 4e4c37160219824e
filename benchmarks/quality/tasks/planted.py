"""Task (e): a linear layer whose weight change is known, and planted with a structure that a form may be made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from quality.training import Problem, Rows, mean_loss

WIDTH = 64
RANK = 8
BLOCK = 8
SIDE = 8
"""Rows and columns of tokens."""
PAIRS = 4


class Layer(nn.Module):
    """A linear layer under a squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, inputs: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Inputs and labels are (B, n), or (B, tokens, n)."""
        outputs = self.layer(inputs)
        return SequenceClassifierOutput(loss=nn.functional.mse_loss(outputs, labels), logits=outputs)


def low_rank() -> Tensor:
    """U Vᵀ of rank 8."""
    return torch.randn(WIDTH, RANK) @ torch.randn(RANK, WIDTH)


def block_local() -> Tensor:
    """Full blocks of 8 × 8 on the diagonal: neighbours act on neighbours."""
    return torch.block_diag(*torch.randn(WIDTH // BLOCK, BLOCK, BLOCK).unbind())


def multi_scale() -> Tensor:
    """Products of rank 2 of steps of 1, 2, 4 … 16 channels, each scale as large as the others."""
    change = torch.zeros(WIDTH, WIDTH)
    for scale in (1, 2, 4, 8, 16):
        part = torch.randn(WIDTH // scale, 2) @ torch.randn(2, WIDTH // scale)
        part = torch.kron(part, torch.ones(scale, scale))
        change += part / part.norm()
    return change


def random() -> Tensor:
    """Independent normal values."""
    return torch.randn(WIDTH, WIDTH)


def weight_rows(change: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """White inputs (N, n), and what the change adds to their outputs, of mean square 1."""
    inputs = torch.randn(number, WIDTH)
    return inputs, inputs @ (change.T * WIDTH**0.5 / change.norm())


def filter_rows() -> Callable[[int], tuple[Tensor, Tensor]]:
    """White tokens on a grid, and four channel pairs each through a 3 × 3 filter of its own over the grid.

    Channels that are read are orthonormal and filters have norm 1, so that what is added has mean square 1 here too.
    """
    into = torch.linalg.qr(torch.randn(WIDTH, PAIRS)).Q
    out = torch.randn(PAIRS, WIDTH)
    out *= WIDTH**0.5 / out.norm()
    kernels = torch.randn(PAIRS, 1, 3, 3)
    kernels /= kernels.flatten(1).norm(dim=1)[:, None, None, None]

    def rows(number: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(number, SIDE * SIDE, WIDTH)
        maps = (inputs @ into).transpose(1, 2).unflatten(2, (SIDE, SIDE))
        padded = nn.functional.pad(maps, [1] * 4, mode="circular")
        return inputs, nn.functional.conv2d(padded, kernels, groups=PAIRS).flatten(2).transpose(1, 2) @ out

    return rows


CHANGES: dict[str, Callable[[], Tensor]] = {
    "low-rank": low_rank,
    "block-local": block_local,
    "multi-scale": multi_scale,
    "random": random,
}
SPATIAL = "spatial filter"


def relative_error(model: nn.Module, rows: Rows) -> float:
    """‖found − planted‖ / ‖planted‖ of the outputs' change, which for white inputs is that of the weights.

    What is planted has mean square 1.
    """
    return mean_loss(model, rows) ** 0.5


@dataclass(frozen=True)
class Planted:
    """Args: one of `CHANGES` or `SPATIAL`, training steps."""

    kind: str
    steps: int = 300
    metric = "relative error"
    higher_is_better = False
    layers = "linear"
    attention = ""

    @property
    def name(self) -> str:
        return f"planted/{self.kind}"

    @property
    def has_grid(self) -> bool:
        return self.kind == SPATIAL

    def problem(self, seed: int) -> Problem:
        torch.manual_seed(seed)
        model = Layer()
        batch_size = 4 if self.has_grid else 64
        if self.has_grid:
            rows = filter_rows()
        else:
            change = CHANGES[self.kind]()

            def rows(number: int) -> tuple[Tensor, Tensor]:
                return weight_rows(change, number)

        splits: dict[str, Rows] = {}
        held_out = 4 * batch_size
        for name, number in (("train", self.steps * batch_size), ("validation", held_out), ("test", held_out)):
            inputs, change_of_outputs = rows(number)
            with torch.no_grad():
                labels = model.layer(inputs) + change_of_outputs
            splits[name] = {"inputs": inputs, "labels": labels}
        return Problem(model, ["layer"], [], splits, batch_size, self.steps, relative_error, seed, grid=self.grid)

    @property
    def grid(self) -> dict[str, Any]:
        return {"grid_size": (SIDE, SIDE), "num_prefix_tokens": 0} if self.has_grid else {}


TASKS = [Planted(kind) for kind in (*CHANGES, SPATIAL)]
