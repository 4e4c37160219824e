"""What modes of PyTorch and kinds of tensors do to operations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_off(tensors: Sequence[Tensor | None]) -> AbstractContextManager[Any]:
    """Context in which operations keep the dtype of their tensors, on the device of the first of these.

    Autocast would change the dtype of some operations, and refuse a mixture for others.
    """
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("meta"))
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device) else nullcontext()


def is_autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for a device, of any type."""
    return (
        torch._C._is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
    )


def is_transformed() -> bool:
    """Whether a tracer records operations or torch.func transforms them."""
    return torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems: no fake or other subclass, and not inside of a graph, trace or transform."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not is_transformed()
