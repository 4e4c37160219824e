"""A cache of synthesised factors: a factor is kept for the length of a scope, and no longer.

There are two kinds of scopes. A user opens `frozen_factors` over a model, and promises that nothing changes inside.
There a factor is kept from its first use on, and is not checked.

The library opens the other scope around each call that PEFT makes of a model, such as `generate`. Nobody promises that
the weights stay as they are. So a factor is kept only from its second use without gradients on, which a plain forward
does not reach. Every use checks that the factor's tensors are the same objects, of the same version, in the same
storage.

Some writers change a tensor and leave its version as it is. Fused optimizers do; a hook that runs after every
optimizer's step notices them. Writes through `.data` or a NumPy view, and by kernels and collectives that PyTorch's
autograd does not know, are not seen before the call ends. `torch.autograd.graph.increment_version` makes them seen.
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

# Threads may run one model. The lock guards counters that are read and then written.
_change = threading.Lock()
_steps = 0
"""Number of steps that optimizers have made, in any thread."""


def _count_step(*_: Any) -> None:
    global _steps
    if not torch.compiler.is_compiling():  # compiled steps raise the versions of what they write
        _steps += 1


register_optimizer_step_post_hook(_count_step)


class Keeping:
    """The cache of one factor: it holds the factor inside `frozen_factors`, and counts possible changes.

    Attributes:
        changes: number of events so far that may change the factor and leave no trace at its tensors: forwards with
            gradients, moves, casts and loads.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._scopes = 0  # number of open `frozen_factors`, in any thread
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
        """Forget the kept factor. If a scope is open, the next use synthesises it again."""
        with _change:
            self.changes += 1
            self._frozen = _Frozen() if self._scopes else None

    def get(self, sources: Callable[[], Sequence[Tensor]], synthesise: Callable[[], Tensor]) -> Tensor:
        """The factor: the kept one if it is still right, otherwise a new one.

        Args:
            sources: returns the tensors that the factor is made from, or an empty sequence if some are not known.
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
        if torch.is_grad_enabled():  # a kept factor has no graph; and a training step is likely to follow
            self.changes += 1
            return synthesise()
        call = _call.get()
        if call is None:
            return synthesise()
        made = call.made.get(self)
        unchanged = False
        if made is not None and made.changes == self.changes and made.steps == _steps:
            now = sources()
            # A plain loop, for this runs for each factor and each token that is generated.
            unchanged = len(now) == len(made.traces)
            for (tensor, version, address), current in zip(made.traces, now, strict=False):
                if current is not tensor or current._version != version or current.data_ptr() != address:
                    unchanged = False
                    break
            if unchanged and made.tensor is not None:
                return made.tensor
        # These are noted before the factor is made: if another thread writes meanwhile, the next use notices.
        changes, steps, traces = self.changes, _steps, _traces(sources())
        factor = synthesise()
        if traces:
            call.made[self] = _Made(changes, steps, traces, factor if unchanged and call.can_keep else None)
        return factor

    def check_gradients(self) -> None:
        """Refuse gradients inside `frozen_factors`.

        Raises:
            RuntimeError: such a scope is open, and gradients are enabled.
        """
        if self._frozen is not None and torch.is_grad_enabled():
            raise RuntimeError(
                "Inside wara_peft.frozen_factors the factors are constants, and this forward asks for gradients. "
                "Run it under torch.no_grad() or torch.inference_mode(), or leave the scope to train."
            )


class _Frozen:
    """Holds a factor inside `frozen_factors`: `tensor` is None until the factor's first use there."""

    tensor: Tensor | None = None


_Trace = tuple[Tensor, int, int]
"""A tensor, its version, and the address of its storage."""


def _traces(tensors: Sequence[Tensor]) -> list[_Trace] | None:
    """Version and address of each tensor, by which a later use notices changes; None if changes cannot be noticed."""
    try:
        return [(tensor, tensor._version, tensor.data_ptr()) for tensor in tensors]
    except RuntimeError:  # inference tensors have no version, and tensors of torch.func and fake ones no storage
        return None


class _Made(NamedTuple):
    """A factor that a call has made, with the facts by which a later use notices that the factor is stale.

    Attributes:
        changes, steps: `Keeping.changes` and `_steps` at the time when the factor was made.
        traces: traces of the tensors that the factor was made from.
        tensor: the factor, or None if it was used only once so far.
    """

    changes: int
    steps: int
    traces: list[_Trace]
    tensor: Tensor | None


class _Call:
    """One call of a model. It holds the factors that were made in it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.made: dict[Keeping, _Made] = {}

    @cached_property
    def can_keep(self) -> bool:
        """Whether factors may be kept in this call: not with FSDP2, whose gathered parameters tell no change."""
        # FSDP is not imported here: a model can only have its modules if somebody else has imported it.
        fsdp = sys.modules.get("torch.distributed.fsdp")
        return fsdp is None or not any(isinstance(module, fsdp.FSDPModule) for module in self.model.modules())


# A context variable, so that calls in other threads and coroutines have factors of their own.
_call: ContextVar[_Call | None] = ContextVar("wara_peft_call", default=None)


@contextmanager
def factors_of_one_call(model: nn.Module) -> Iterator[None]:
    """Scope of one call of a model, in this thread. Inside, factors are kept from their second use on."""
    if torch.compiler.is_compiling():  # a graph keeps nothing
        yield
        return
    before, call = _call.get(), _Call(model)
    _call.set(call)
    try:
        yield
    finally:
        if _call.get() is call:  # a generator that was left inside the scope may be finished by another thread
            _call.set(before)
