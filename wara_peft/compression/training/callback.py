"""The life of a training method, which transformers' `Trainer` or a loop of one's own goes through."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback


class TrainingMethod(TrainerCallback):
    """Calls `start`, `before_forward`, `after_backward` and `finish` at the events of transformers' `Trainer`.

    Who writes a loop calls these methods. A method's `start` sets `_model` when it has found nothing wrong, and its
    `finish` sets it to None.

    Attributes:
        adds_to_gradients: whether `after_backward` changes gradients, which fp16 would have scaled by then.
    """

    adds_to_gradients = False
    _model: nn.Module | None = None

    def _started(self) -> nn.Module:
        """The model that is being trained.

        Raises:
            RuntimeError: there is none before `start` and after `finish`.
        """
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__} has not been started. Call `start(model)` first.")
        return self._model

    def start(self, model: nn.Module) -> None:
        raise NotImplementedError

    def before_forward(self, step: int) -> object:
        """Do nothing, if a method has nothing to do here."""

    def after_backward(self) -> None:
        """Do nothing, if a method has nothing to do here."""

    def finish(self) -> object:
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.adds_to_gradients and args.fp16:
            raise ValueError("fp16 scales gradients, which a penalty's cannot be added to. Train with bf16.")
        self.start(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_forward(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_backward()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()
