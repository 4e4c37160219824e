"""Constant tensors, made once for each combination of arguments and device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps

import torch
from torch import Tensor

from .modes import is_plain


def constant_tensors(build: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Decorator: keep the tensors that a function of a device and hashable arguments makes.

    In place of the device it is then called with a tensor that the constants will meet.

    Nothing that is in force at their first use stays with them. The device is named, whatever the default device is.
    They are made outside of inference mode, whose tensors autograd does not take. What is made for fake tensors and
    other subclasses, in a trace or inside a transform of torch.func is of use only there, and not kept; in a graph of
    torch.compile the making is a part of the graph. They are no buffers, which a cast of the model would round.
    """
    kept: dict[tuple[Hashable, ...], tuple[Tensor, ...]] = {}

    @wraps(build)
    def get(like: Tensor, *args: Hashable) -> tuple[Tensor, ...]:
        if not is_plain(like):
            return build(like.device, *args)
        key = (like.device, *args)
        found = kept.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = build(like.device, *args)
            if all(map(is_plain, found)):
                kept[key] = found
        return found

    return get
