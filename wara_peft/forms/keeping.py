"""How long a synthesised factor is kept: for the length of a scope, and no longer.

There are two kinds of scopes. A user opens `frozen_factors` over a model, and promises that nothing trains inside. The
library opens one around each call that PEFT makes of a model, since weights do not change within one `generate`; it
promises nothing, so it keeps a factor from its second call without gradients on, which a plain forward does not reach,
and steps aside for good where the factor has been called with gradients, moved, cast or loaded meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_change = threading.Lock()


class Keeping:
    """What one factor keeps inside `frozen_factors`, and how often it may have changed.

    Attributes:
        changes: counts what ends the keeping inside a call: forwards with gradients, moves, casts, loads.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._scopes = 0  # that are open, in any thread
        self._kept: _Kept | None = None

    def enter(self) -> None:
        with _change:
            self._scopes += 1
            self._kept = self._kept or _Kept()

    def leave(self) -> None:
        with _change:
            self._scopes -= 1
            self._kept = self._kept if self._scopes else None

    def changed(self) -> None:
        """Forget what is kept, which is made anew if a scope is open."""
        with _change:
            self.changes += 1
            self._kept = _Kept() if self._scopes else None

    def get(self, factor: nn.Module, synthesise: Callable[[], Tensor]) -> Tensor:
        """The factor, kept or made now.

        Args:
            factor: the factor's module.
            synthesise: makes its tensor.

        Raises:
            RuntimeError: inside `frozen_factors` while gradients are enabled.
        """
        kept = self._kept  # read once: another thread may enter or leave a scope meanwhile
        if kept is not None:
            if torch.is_grad_enabled():
                self.check_gradients()
            if kept.tensor is None:
                kept.tensor = synthesise()
            return kept.tensor
        if torch.compiler.is_compiling():  # a graph computes it anew, and must leave nothing here
            return synthesise()
        if torch.is_grad_enabled():
            self.changes += 1
            return synthesise()
        call = _call.get()
        if call is None:
            return synthesise()
        changes, tensor = call.kept.get(factor, _NOTHING)
        if tensor is not None and changes == self.changes:
            return tensor
        return call.make(factor, self.changes, synthesise)

    def check_gradients(self) -> None:
        """Refuse gradients inside `frozen_factors`.

        Raises:
            RuntimeError: they are enabled there.
        """
        if self._kept is not None and torch.is_grad_enabled():
            raise RuntimeError(
                "Inside wara_peft.frozen_factors the factors are constants, and this forward asks for gradients. "
                "Run it under torch.no_grad() or torch.inference_mode(), or leave the scope to train."
            )


class _Kept:
    """A factor's tensor inside `frozen_factors`, None until its first use there."""

    tensor: Tensor | None = None


_Entry = tuple[int | None, Tensor | None]
_NOTHING: _Entry = (None, None)
"""What a call holds of a factor before its first use."""


class _Call:
    """One call of a model: what its factors keep, each with the number of changes with which it was first called."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: dict[nn.Module, _Entry] = {}
        self._factors: set[nn.Module] | None = None

    def make(self, factor: nn.Module, changes: int, synthesise: Callable[[], Tensor]) -> Tensor:
        """The factor made now, and kept if it was called before with the same number of changes."""
        tensor = synthesise()
        at_first, _ = self.kept.get(factor, _NOTHING)
        if at_first is None:
            self.kept[factor] = (changes, None)
        elif at_first == changes and self._is_of_model(factor):
            self.kept[factor] = (changes, tensor)
        return tensor

    def _is_of_model(self, factor: nn.Module) -> bool:
        """Whether it is not another model's, which may be trained in between."""
        if self._factors is None:
            self._factors = set(self.model.modules())
        return factor in self._factors


_call: ContextVar[_Call | None] = ContextVar("wara_peft_call", default=None)


@contextmanager
def one_call(model: nn.Module) -> Iterator[None]:
    """Scope of one call of a model, in this thread: inside, its factors are kept from their second use on."""
    if torch.compiler.is_compiling():  # a graph keeps nothing
        yield
        return
    before, call = _call.get(), _Call(model)
    _call.set(call)
    try:
        yield
    finally:
        if _call.get() is call:  # another thread may finish a generator that this one has left
            _call.set(before)
