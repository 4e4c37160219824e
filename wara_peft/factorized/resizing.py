"""Parameters that change their shape and stay the parameters that an optimizer knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def set_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another shape, of its dtype and device; its gradient is forgotten."""
    # While a graph is alive, as that of the last loss is, autograd keeps the node that takes in gradients, which
    # expects the old shape. A change of dtype makes it forget the node.
    other = torch.float32 if parameter.dtype == torch.float16 else torch.float16
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = values
    parameter.grad = None
