"""Parameters that change their shape. They stay the same objects, so that an optimizer still knows them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def set_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another shape, in its own dtype and on its device. Its gradient is forgotten."""
    # As long as some graph is alive, such as that of the last loss, autograd keeps the node that accumulates the
    # parameter's gradient. That node expects the old shape. A change of dtype makes autograd forget it.
    other = torch.float32 if parameter.dtype == torch.float16 else torch.float16
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = values
    parameter.grad = None
