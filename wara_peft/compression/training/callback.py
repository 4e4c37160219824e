"""The methods of a training method, in the order in which transformers' `Trainer` or a user's loop calls them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback


class TrainingMethod(TrainerCallback):
    """Base class of training methods. As a callback it calls its own methods at the events of transformers' `Trainer`.

    The methods are `start`, `before_forward`, `after_backward` and `finish`. A user's own loop calls them itself.
    Subclasses set `_model` in `start`, after all checks, and set it to None in `finish`.

    Attributes:
        adds_to_gradients: whether `after_backward` changes gradients. Then fp16 is refused, because it scales them.
    """

    adds_to_gradients = False
    _model: nn.Module | None = None

    def _started(self) -> nn.Module:
        """Give the model that is being trained.

        Raises:
            RuntimeError: `start` has not been called, or `finish` has been.
        """
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__} has not been started. Call `start(model)` first.")
        return self._model

    def start(self, model: nn.Module) -> None:
        raise NotImplementedError

    def before_forward(self, step: int) -> object:
        """Prepare the forward of a step, counted from 0. Subclasses may override it; here it does nothing."""

    def after_backward(self) -> None:
        """Change gradients before the optimizer's step. Subclasses may override it; here it does nothing."""

    def finish(self) -> object:
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.adds_to_gradients and args.fp16:
            raise ValueError("fp16 scales gradients, which a penalty's cannot be added to. Train with bf16.")
        self.start(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_forward(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # This event comes once for each step of the optimizer, after gradients were accumulated and clipped.
        self.after_backward()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()
