"""The methods of a training method, in the order in which transformers' `Trainer` or a user's loop calls them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .resuming import check_resumed, marks_of


class TrainingMethod(TrainerCallback, ExportableState):
    """Base class of training methods. As a callback it calls its own methods at the events of transformers' `Trainer`.

    The methods are `start`, `before_forward`, `after_backward` and `finish`. A user's own loop calls them itself.
    Subclasses set `_model` in `start`, after all checks, and set it to None in `finish`.

    `Trainer` writes the result of `state` into its checkpoints. A training that resumes checks that it has the weights
    and moments of its checkpoint before the first step, see `check_resumed`.

    Attributes:
        adds_to_gradients: whether `after_backward` changes gradients. Then fp16 is refused, because it scales them.
        resumed: names of attributes that a training takes from its checkpoint when it resumes.
    """

    adds_to_gradients = False
    resumed: ClassVar[tuple[str, ...]] = ()
    _model: nn.Module | None = None
    _optimizer: Any = None

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

    def arguments(self) -> dict[str, Any]:
        """Give the arguments with which this object was made."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        attributes = {name: getattr(self, name) for name in self.resumed}
        if self._model is not None:  # `Trainer` also asks when it is made
            attributes["_marks"] = marks_of(self._model, self._optimizer)
        return {"args": self.arguments(), "attributes": attributes}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self.adds_to_gradients and args.fp16:
            raise ValueError("fp16 scales gradients, which a penalty's cannot be added to. Train with bf16.")
        # `Trainer` fails at its next checkpoint if the one that it resumes from was written without this callback.
        entry = state.stateful_callbacks.setdefault(type(self).__name__, {})
        saved: dict[str, Any] = {}
        if state.global_step:
            saved = entry.get("attributes", {}) if isinstance(entry, dict) else {}
            given = [args.resume_from_checkpoint] if args.resume_from_checkpoint else []
            places = [*given, Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")]
            check_resumed(model, optimizer, saved.get("_marks"), [Path(place) for place in places], state)
        self.start(model)
        self._optimizer = optimizer
        for name in self.resumed:
            if name in saved:  # `start` has forgotten it
                setattr(self, name, copy.deepcopy(saved[name]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_forward(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # This event comes once for each step of the optimizer, after gradients were accumulated and clipped.
        self.after_backward()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()
        self._optimizer = None
