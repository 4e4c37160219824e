"""Constant tensors, made once for each combination of arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")


def is_transformed() -> bool:
    """Whether operations are being recorded, by torch.compile or a tracer, or transformed, by torch.func."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
    )


def made_once(build: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """Keep what a function of hashable arguments makes, which say on which device.

    It is made outside of inference mode, whose tensors autograd does not take. What is made under a mode that fakes
    tensors, inside a transform of torch.func or in a trace is of use only there, and not kept; a mode that fakes
    tensors takes no others, so what is kept does not serve there. The tensors are no buffers, which a cast of the
    model would round.
    """
    kept: dict[tuple[object, ...], Tensor] = {}

    @wraps(build)
    def get(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        faked = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if args in kept and not faked:
            return kept[args]
        with torch.inference_mode(False):
            tensor = build(*args, **kwargs)
        if type(tensor) is Tensor and not is_transformed():
            kept[args] = tensor
        return tensor

    return get
