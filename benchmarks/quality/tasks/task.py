"""What the runner asks of a task."""

from __future__ import annotations

from typing import Protocol

from quality.training import Problem


class Task(Protocol):
    """A thing to learn, made anew for each seed.

    Attributes:
        name: `family/variant`; results of a family share a file.
        metric: what `Problem.score` returns.
        higher_is_better: whether a larger metric is the better one.
        layers: "linear" or "conv", the kind of the layers that are adapted.
        has_grid: whether they see image patches on a grid.
        attention: "vit" where the model has attention of that kind to replace, else "".
    """

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def layers(self) -> str: ...
    @property
    def has_grid(self) -> bool: ...
    @property
    def attention(self) -> str: ...

    def problem(self, seed: int) -> Problem:
        """Base, head, data and order of a seed; the same each time, in every process."""
