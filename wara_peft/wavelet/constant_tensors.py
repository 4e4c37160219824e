"""Constant tensors: objects that need the same ones share them, and they are freed with the last of these objects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from functools import wraps
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .modes import is_plain


class Constants:
    """The constant tensors that one object uses. Copies and pickles of that object start without any."""

    def __init__(self) -> None:
        self._held: dict[Hashable, _Shared] = {}

    def clear(self) -> None:
        """Let go of all of them. The next use makes what it needs, or takes what another object holds."""
        self._held.clear()

    def __reduce__(self) -> tuple[type[Constants], tuple[()]]:
        return Constants, ()


class _Shared:
    """Tensors that live for as long as some `Constants` holds them."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors


_all_shared: WeakValueDictionary[Hashable, _Shared] = WeakValueDictionary()
_lock = threading.Lock()


def constant_tensors(build: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Decorator: share the tensors that a function of a device and hashable arguments makes.

    The function is then called with the `Constants` of the object that uses the tensors, and with a tensor that they
    will meet in place of the device.

    The tensors do not depend on the settings at their first use. The device is named, whatever the default device is.
    They are made outside of inference mode, whose tensors autograd does not take. Tensors that are made for fake
    tensors and other subclasses, in a trace or inside a transform of torch.func are of use only there, and not kept; a
    graph of torch.compile makes its own. They are no buffers, since a cast of the model would round buffers.
    """

    @wraps(build)
    def get(constants: Constants, like: Tensor, *args: Hashable) -> tuple[Tensor, ...]:
        if not is_plain(like):
            return build(like.device, *args)
        key = (build, like.device, *args)
        found = constants._held.get(key) or _all_shared.get(key)
        if found is None:
            with torch.inference_mode(False):
                tensors = build(like.device, *args)
            if not all(map(is_plain, tensors)):
                return tensors
            with _lock:  # another thread may have made the same ones meanwhile
                found = _all_shared.setdefault(key, _Shared(tensors))
        constants._held[key] = found
        return found.tensors

    return get
