"""Constant tensors: objects that need equal ones share them. The last of these objects to go frees them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from functools import wraps
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .modes import is_plain


class Constants:
    """The constant tensors that one object uses. A copy or pickle of that object starts without any."""

    def __init__(self) -> None:
        self._held: dict[Hashable, _Shared] = {}

    def clear(self) -> None:
        """Release all tensors. The next use takes those that another object holds, or makes new ones."""
        self._held.clear()

    # A file should not hold tensors that can be made again, and the copy may be loaded on another device.
    def __reduce__(self) -> tuple[type[Constants], tuple[()]]:
        return Constants, ()


class _Shared:
    """Tensors that live for as long as some `Constants` holds them.

    They need this object around them, since a tuple cannot be referenced weakly.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors


_all_shared: WeakValueDictionary[Hashable, _Shared] = WeakValueDictionary()
_lock = threading.Lock()


def constant_tensors(build: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Decorator: share the tensors that a function makes from a device and hashable arguments.

    Callers of the decorated function pass the `Constants` of the object that uses the tensors first. In place of the
    device they pass a tensor that lies on it.

    The tensors do not depend on the settings at their first use. They lie on the device that is named, whatever the
    default device is. They are made outside of inference mode, since autograd refuses tensors that were made in it.

    Tensors that are made for fake tensors or other subclasses, in a trace or inside a transform of torch.func, are of
    use only there, and are not kept. A graph of torch.compile makes its own tensors. The tensors are no buffers, since
    a cast of the model would round buffers.
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
            # Modes such as FakeTensorMode make fake tensors though `like` is a plain one.
            if not all(map(is_plain, tensors)):
                return tensors
            with _lock:  # another thread may have made the same ones meanwhile
                found = _all_shared.setdefault(key, _Shared(tensors))
        constants._held[key] = found
        return found.tensors

    return get
