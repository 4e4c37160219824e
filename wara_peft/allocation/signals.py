"""What a model's batches tell of its linear layers: the mean gradient of each weight, or the variance of the inputs.

Matrices are summed over all processes where there are several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..calibration.batches import LossFunction, arguments_of, loss_of, with_gradient
from ..calibration.input_moments import Moments
from ..calibration.processes import processes


def mean_gradients(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, tuple[int, int]]],
    batches: list[Any],
    loss_fn: LossFunction | None,
) -> Iterator[tuple[str, Tensor]]:
    """The mean over batches of ∂loss/∂W = Σ g xᵀ, (m, n), in float32 or better, of each linear layer.

    g is the gradient of the layer's output, and x its input: that asks nothing of the weight, which may be quantized.

    Args:
        model: in evaluation mode, with all parameters frozen.
        layers: linear layers, each with (m, n), by name.
        batches: the batches, on the model's device.
        loss_fn: gives the loss; None takes that which the model returns.

    Raises:
        ValueError: a loss is no scalar, or a gradient does not come, or is not finite.
    """
    device = next(model.parameters()).device
    taps = {name: _Tap(name, shape, device) for name, (_, shape) in layers.items()}
    handles = [layers[name][0].register_forward_hook(tap) for name, tap in taps.items()]
    try:
        for batch in batches:
            loss = loss_of(model, batch, loss_fn)
            if loss.requires_grad:  # or nothing that it depends on is a target
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        tap = taps.pop(name)
        total, calls, count = _summed(tap.total, tap.calls, len(batches))
        if calls == 0:
            raise ValueError(
                f"The gradient never reaches module {name!r} in these batches. Pass batches that use it, or leave it "
                "out with `exclude_modules`."
            )
        yield name, _finite(total.div_(count), f"The gradient of module {name!r}")


class _Tap:
    """Forward hook of a linear layer, which sums up g xᵀ."""

    def __init__(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        self.name = name
        self.total = torch.zeros(shape, device=device)
        self.calls = 0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs: Tensor = args[0].detach()
        # Where the layer computes, and no less precisely.
        self.total = self.total.to(inputs.device, torch.promote_types(inputs.dtype, torch.float32))
        version = inputs._version

        def add(gradient: Tensor) -> None:
            if inputs._version != version:
                raise RuntimeError(f"The input of module {self.name!r} is changed in place after use.")
            rows, columns = (x.reshape(-1, x.shape[-1]).to(self.total.dtype) for x in (gradient, inputs))
            self.total.addmm_(rows.T, columns)
            self.calls += 1

        return with_gradient(output, add)


def input_covariances(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, tuple[int, int]]],
    batches: list[Any],
    loss_fn: LossFunction | None,
) -> Iterator[tuple[str, Tensor]]:
    """The covariance of the inputs, (n, n), of each linear layer; positions that a batch masks do not count.

    Arguments and errors are those of `mean_gradients`.
    """
    moments = Moments(model, with_mean=True)
    with moments.watching([layer for layer, _ in layers.values()]), torch.no_grad():
        for batch in batches:
            args, kwargs = arguments_of(batch)
            moments.start_batch(kwargs)
            if loss_fn is None:
                model(*args, **kwargs)
            else:  # which knows how to call the model; what it returns does not matter
                loss_fn(model, batch)
    found = moments.of_layers()
    for name, (layer, (_, length)) in layers.items():
        total = found.get(layer, torch.zeros(length + 1, length + 1, device=next(model.parameters()).device))
        total, calls, _ = _summed(total.clone(), int(layer in found), len(batches))  # layers may share it
        if calls == 0:
            raise ValueError(
                f"No batch reaches module {name!r}. Pass batches that use it, or leave it out with `exclude_modules`."
            )
        total = total.double()
        mean = total[-1, :-1] / total[-1, -1]
        covariance = total[:-1, :-1] / total[-1, -1] - torch.outer(mean, mean)
        yield name, _finite(covariance, f"The variance of the inputs of module {name!r}")


def _summed(total: Tensor, calls: int, count: int) -> tuple[Tensor, int, int]:
    """The sums over all processes; the matrix is written to."""
    if processes() == 1:
        return total, calls, count
    counts = torch.tensor([calls, count], device=total.device)
    dist.all_reduce(total)
    dist.all_reduce(counts)
    return total, int(counts[0]), int(counts[1])


def _finite(matrix: Tensor, what: str) -> Tensor:
    if not matrix.isfinite().all():
        raise ValueError(f"{what} is not finite. Look for broken batches or weights, or a loss that overflows.")
    return matrix
