"""A callback of transformers' `Trainer` that empties and cuts the last components of a nested adapter."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .arguments import check_argument
from .nested import cut_ranks, ordered_layers, shrink_ranks


class RankShrinking(TrainerCallback):
    """Calls `shrink_ranks` at the end of each epoch, and `cut_ranks` at the end of the training.

    Args:
        threshold: as in `shrink_ranks`.
        adapter_name: the adapter, with `ordered_dropout` and a `rank_penalty`.
    """

    def __init__(self, threshold: float = 1e-5, adapter_name: str = "default") -> None:
        check_argument("RankShrinking(threshold)", "threshold", threshold, "a number")
        self.threshold = threshold
        self.adapter_name = adapter_name

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        ordered_layers(model, self.adapter_name)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        shrink_ranks(model, self.threshold, self.adapter_name, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        cut_ranks(model, self.adapter_name)
