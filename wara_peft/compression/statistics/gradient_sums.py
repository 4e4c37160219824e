"""Sums of the gradients of one linear layer, over positions and over samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...calibration.batches import with_gradient
from ...calibration.input_moments import Moments, input_of, version_of
from ...calibration.processes import processes
from ...factorized.low_rank_linear import linear_shape


class GradientSums:
    """Forward hook of a linear layer that sums g gᵀ over positions and Σ_i (∂loss/∂W_ij)² over samples, in float64.

    g is the gradient of the loss by the layer's output at one position. The model must run one sample at a time, with
    `end_forward` before the backward pass and `end_sample` after it. Then all calls of the layer, and all positions in
    them, belong to this sample.
    """

    def __init__(self, name: str, layer: nn.Linear | Conv1D, masks: Moments, statistics: Collection[str]) -> None:
        self.name, self.masks = name, masks
        n, m = linear_shape(layer)
        self.device = device = layer.weight.device
        self.outer = torch.zeros(m, m, dtype=torch.float64, device=device) if "gradients" in statistics else None
        self.squares = torch.zeros(n, dtype=torch.float64, device=device) if "fisher" in statistics else None
        self.count = self.samples = 0
        self._calls = self._arrived = 0
        self._is_backward = False
        self._gradient: Tensor | None = None
        self._rows: list[Tensor] = []

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        inputs = input_of(args, kwargs).detach()
        # The gradient arrives in the backward pass. A later layer may have overwritten the input by then, which only
        # autograd's version counter shows, as autograd itself does not save inputs of a frozen layer.
        version = version_of(inputs)
        counting = self.masks.counting(layer, inputs)
        if not self._is_backward:  # a checkpoint calls its layers again in the backward pass
            self._calls += 1
            self.count += inputs[..., 0].numel() if counting is None else int(counting.sum())

        def add(gradient: Tensor) -> None:
            if self.squares is not None and version_of(inputs) != version:
                raise RuntimeError(
                    f"The input of module {self.name!r} is changed in place after use. Let the module that changes it "
                    "work on a copy (inplace=False)."
                )
            self._add(inputs, gradient, counting)

        return with_gradient(output, add)

    def _add(self, inputs: Tensor, gradient: Tensor, counting: Tensor | None) -> None:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        if self.outer is not None:
            counted = gradient if counting is None else gradient[counting]
            self._rows.append(counted.reshape(-1, gradient.shape[-1]).to(wide))
            # A product (m, m) for each sample would cost more than the sample itself, so rows are gathered.
            if sum(map(len, self._rows)) >= len(self.outer):
                self._multiply()
        if self.squares is not None:
            rows, columns = (x.reshape(-1, x.shape[-1]).to(wide) for x in (gradient, inputs))
            product = rows.T @ columns
            self._gradient = product if self._gradient is None else self._gradient + product
            self._arrived += 1
            # A layer that runs once in a sample need not keep its (m, n) gradient until the sample's end.
            if self._arrived == self._calls:
                self._square()

    def _multiply(self) -> None:
        if self.outer is not None and self._rows:
            rows = torch.cat(self._rows)
            self.outer += rows.T @ rows
        self._rows = []

    def _square(self) -> None:
        if self.squares is not None and self._gradient is not None:
            self.squares += torch.linalg.vector_norm(self._gradient, dim=0, dtype=torch.float64).square()
        self._gradient = None

    def end_forward(self) -> None:
        """Note that further calls of the layer are repetitions."""
        self._is_backward = True

    def end_sample(self) -> None:
        """Square the sum over the calls of the layer in this sample. A sample without any call counts as zero."""
        self._square()
        self._is_backward = False
        self._calls = self._arrived = 0
        self.samples += 1

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """Give E[g gᵀ] over positions and the mean of the squares over samples, of all processes."""
        self._multiply()
        if processes() > 1:
            counts = torch.tensor([self.count, self.samples], device=self.device)
            for total in (counts, self.outer, self.squares):
                if total is not None:
                    dist.all_reduce(total)
            self.count, self.samples = counts.tolist()
        return (
            None if self.outer is None else (self.outer / max(self.count, 1)).cpu(),
            None if self.squares is None else (self.squares / max(self.samples, 1)).cpu(),
        )
