"""How long a synthesised factor is kept: for the length of a scope, and no longer.

There are two kinds of scopes. A user opens `frozen_factors` over a model, and promises that nothing changes inside: a
factor is kept from its first use on, and is not checked. The library opens one around each call that PEFT makes of a
model, such as a `generate`, and promises nothing. There a factor is kept from its second use without gradients on,
which a plain forward does not reach, and every use checks that the tensors that it was made from are the same objects,
of the same version, in the same storage.

Some writers leave no such trace. Fused optimizers are noticed by a hook after every optimizer's step. Writes through
`.data` or a NumPy view, and those of kernels and collectives that PyTorch's autograd does not know, go unseen until
the call ends, unless `torch.autograd.graph.increment_version` tells.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_change = threading.Lock()
_steps = 0
"""How many steps optimizers have made, in any thread."""


def _count_step(*_: Any) -> None:
    global _steps
    if not torch.compiler.is_compiling():  # compiled steps raise the versions of what they write
        _steps += 1


register_optimizer_step_post_hook(_count_step)


class Keeping:
    """What one factor keeps inside `frozen_factors`, and how often it may have changed.

    Attributes:
        changes: counts what may change a factor and leave no trace at its tensors: forwards with gradients, moves,
            casts, loads, limits.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._scopes = 0  # that are open, in any thread
        self._frozen: _Frozen | None = None

    def enter(self) -> None:
        with _change:
            self._scopes += 1
            self._frozen = self._frozen or _Frozen()

    def leave(self) -> None:
        with _change:
            self._scopes -= 1
            self._frozen = self._frozen if self._scopes else None

    def changed(self) -> None:
        """Forget what is kept; if a scope is open, the next use synthesises the factor again."""
        with _change:
            self.changes += 1
            self._frozen = _Frozen() if self._scopes else None

    def get(self, sources: Callable[[], Sequence[Tensor]], synthesise: Callable[[], Tensor]) -> Tensor:
        """The factor, kept or made now.

        Args:
            sources: gives the tensors that the factor is made from, or none of them if they are not all known.
            synthesise: makes the factor.

        Raises:
            RuntimeError: inside `frozen_factors` while gradients are enabled.
        """
        frozen = self._frozen  # read once: another thread may enter or leave a scope meanwhile
        if frozen is not None:
            if torch.is_grad_enabled():
                self.check_gradients()
            if frozen.tensor is None:
                frozen.tensor = synthesise()
            return frozen.tensor
        if torch.compiler.is_compiling():  # a graph synthesises its factors itself, and must leave nothing here
            return synthesise()
        if torch.is_grad_enabled():
            self.changes += 1
            return synthesise()
        call = _call.get()
        if call is None:
            return synthesise()
        made = call.made.get(self)
        unchanged = False
        if made is not None and made.changes == self.changes and made.steps == _steps:
            now = sources()
            unchanged = len(now) == len(made.traces)
            for (tensor, version, address), current in zip(made.traces, now, strict=False):
                if current is not tensor or current._version != version or current.data_ptr() != address:
                    unchanged = False
                    break
            if unchanged and made.tensor is not None:
                return made.tensor
        # These are noted before the factor is made, so that the next use sees what another thread writes meanwhile.
        changes, steps, traces = self.changes, _steps, _traces(sources())
        factor = synthesise()
        if traces:
            call.made[self] = _Made(changes, steps, traces, factor if unchanged and call.can_keep else None)
        return factor

    def check_gradients(self) -> None:
        """Refuse gradients inside `frozen_factors`.

        Raises:
            RuntimeError: they are enabled there.
        """
        if self._frozen is not None and torch.is_grad_enabled():
            raise RuntimeError(
                "Inside wara_peft.frozen_factors the factors are constants, and this forward asks for gradients. "
                "Run it under torch.no_grad() or torch.inference_mode(), or leave the scope to train."
            )


class _Frozen:
    """A factor's tensor inside `frozen_factors`, None until its first use there."""

    tensor: Tensor | None = None


_Trace = tuple[Tensor, int, int]
"""A tensor, its version, and the address of its storage."""


def _traces(tensors: Sequence[Tensor]) -> list[_Trace] | None:
    """Record what a later look needs to notice a change of these tensors; None if it cannot be noticed."""
    try:
        return [(tensor, tensor._version, tensor.data_ptr()) for tensor in tensors]
    except RuntimeError:  # inference tensors have no version, and tensors of torch.func and fake ones no storage
        return None


class _Made(NamedTuple):
    """Holds a factor that a call has made, and how to notice that the factor is stale.

    Attributes:
        changes, steps: how often the factor had changed, and optimizers had stepped, before.
        traces: of the tensors that it was made from.
        tensor: the factor, once it was used twice.
    """

    changes: int
    steps: int
    traces: list[_Trace]
    tensor: Tensor | None


class _Call:
    """Stands for one call of a model, and holds the factors that were made in it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.made: dict[Keeping, _Made] = {}

    @cached_property
    def can_keep(self) -> bool:
        """Whether parameters tell that they were changed: those that FSDP2 gathers for each forward do not."""
        fsdp = sys.modules.get("torch.distributed.fsdp")
        return fsdp is None or not any(isinstance(module, fsdp.FSDPModule) for module in self.model.modules())


_call: ContextVar[_Call | None] = ContextVar("wara_peft_call", default=None)


@contextmanager
def factors_of_one_call(model: nn.Module) -> Iterator[None]:
    """Scope of one call of a model, in this thread: inside, factors are kept from their second use on."""
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
