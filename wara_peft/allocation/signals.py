"""Runs a model over batches and collects, for its linear layers, the mean gradient of each weight or the covariance
of the inputs.

If several processes work together (`torch.distributed`), the matrices are summed over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..calibration.batches import OR_LOSS_FN, LossFunction, arguments_of, loss_of, run_model, with_gradient
from ..calibration.input_moments import Moments, input_of, version_of
from ..calibration.processes import processes


def mean_gradients(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, tuple[int, int]]],
    batches: list[Any],
    loss_fn: LossFunction | None,
) -> Iterator[tuple[str, Tensor]]:
    """Give the mean over batches of ∂loss/∂W = Σ g xᵀ, (m, n), in float32 or better, for each linear layer.

    Here g is the gradient of the layer's output, (m,), and x its input, (n,), at each position. The weight itself is
    not differentiated, so it may be frozen or quantized.

    Args:
        model: the model, in evaluation mode and with all parameters frozen.
        layers: linear layers, each with its shape (m, n), by name.
        batches: the batches, on the model's device.
        loss_fn: gives the loss; None takes the loss that the model returns.

    Raises:
        ValueError: a loss is no scalar, or a gradient is not finite or never reaches a layer.
    """
    device = next(model.parameters()).device
    taps = {name: _Tap(name, shape, device) for name, (_, shape) in layers.items()}
    handles = [layers[name][0].register_forward_hook(tap, with_kwargs=True) for name, tap in taps.items()]
    try:
        for batch in batches:
            loss = loss_of(model, batch, loss_fn)
            # Only the hooks make tensors that require gradients: all parameters are frozen. So a loss without them
            # depends on no target in this batch.
            if loss.requires_grad:
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
    """A forward hook that adds g xᵀ to a sum whenever backward reaches the output of its linear layer.

    Attributes:
        total: the sum, (m, n).
        calls: how many gradients have arrived.
    """

    def __init__(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        self.name = name
        self.total = torch.zeros(shape, device=device)
        self.calls = 0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        inputs = input_of(args, kwargs).detach()
        # The sum lives on the layer's device, since a model may be spread over several, and in the dtype of its
        # inputs or float32, whichever is wider: many small summands would be lost in 16 bits.
        self.total = self.total.to(inputs.device, torch.promote_types(inputs.dtype, torch.float32))
        # `_version` is autograd's count of in-place writes. The hook reads the input only in backward, when a module
        # after this one may have overwritten it; autograd itself does not watch a detached tensor.
        version = version_of(inputs)

        def add(gradient: Tensor) -> None:
            if version_of(inputs) != version:
                raise RuntimeError(
                    f"The input of module {self.name!r} is changed in place after use. Let the module that changes it "
                    "work on a copy (inplace=False)."
                )
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
    """Give the covariance of the inputs, (n, n), for each linear layer, without the positions that a batch masks.

    Arguments and errors are the same as those of `mean_gradients`.
    """
    moments = Moments(model, with_mean=True)
    with moments.watching([layer for layer, _ in layers.values()]), torch.no_grad():
        for batch in batches:
            moments.start_batch(arguments_of(batch)[1])
            if loss_fn is None:
                run_model(model, batch, OR_LOSS_FN)
            else:  # the user's function knows how to call the model; the loss that it returns is not needed
                loss_fn(model, batch)
    found = moments.of_layers()
    for name, (layer, (_, length)) in layers.items():
        zeros = torch.zeros(length + 1, length + 1, dtype=torch.float64, device=next(model.parameters()).device)
        total = found.get(layer, zeros)
        # Layers that get the same input, such as q, k and v, share one matrix, and the sum is made in place.
        total, calls, _ = _summed(total.clone(), int(layer in found), len(batches))
        if calls == 0:
            raise ValueError(
                f"No batch reaches module {name!r}. Pass batches that use it, or leave it out with `exclude_modules`."
            )
        # The last row and column hold the sums of the inputs and, in the corner, their number. E[xxᵀ] − E[x] E[x]ᵀ is
        # a difference of close numbers where the mean is large; the sums are in float64.
        mean = total[-1, :-1] / total[-1, -1]
        covariance = total[:-1, :-1] / total[-1, -1] - torch.outer(mean, mean)
        yield name, _finite(covariance, f"The variance of the inputs of module {name!r}")


def _summed(total: Tensor, calls: int, count: int) -> tuple[Tensor, int, int]:
    """Sum a matrix, in place, and two counts over all processes."""
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
