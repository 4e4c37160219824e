"""Questions about the mode that PyTorch is in, such as autocast or a trace, and about the kind of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_off(tensors: Sequence[Tensor | None]) -> AbstractContextManager[Any]:
    """Context that turns autocast off on the device of the first tensor, so that operations keep their dtype.

    Autocast would change the dtype of some operations, and refuse a mixture of dtypes in others.
    """
    # Every forward of every factor asks this. The private function answers for all devices in one call.
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("meta"))
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device) else nullcontext()


def is_autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for a device. The device may be of any type, also of one that has no autocast."""
    return (
        torch._C._is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
    )


def is_transformed() -> bool:
    """Whether a tracer records operations or torch.func transforms them."""
    # PyTorch has no public function for the second question.
    return torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one: of no subclass (as fake tensors are), in no graph, trace or transform."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not is_transformed()
