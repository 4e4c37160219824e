"""Running a model over batches for what they tell about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

LossFunction = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch, and gives the loss, a scalar."""


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, which leaves dropout out; each module goes back to its own mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as arguments of a model: mappings as keyword arguments, sequences and tensors as positional ones."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


@contextmanager
def with_frozen_parameters(model: nn.Module) -> Iterator[None]:
    """No parameter is trained; each goes back to what it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> Tensor:
    """What `loss_fn(model, batch)` gives, or without one the `loss` of what the model returns for a batch.

    Raises:
        ValueError: the model returns none, or the loss is no scalar.
    """
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)
    else:
        args, kwargs = arguments_of(batch)
        output = model(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                "The model returns no loss for the batches. Give them labels, or pass `loss_fn(model, batch)`."
            )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"The loss must be a scalar tensor, and is of {what}. Take its mean or sum.")
    return loss


def with_gradient(output: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
    """A layer's output, to return in its place from a forward hook, whose gradient is handed over in backward."""
    if not output.requires_grad:
        # A copy, since what follows may change it in place, which autograd refuses for a leaf.
        output = output.requires_grad_().clone()
    if output.requires_grad:  # not so under `no_grad`
        output.register_hook(receive)  # type: ignore[no-untyped-call]
    return output


def groups_within(max_bytes: int, needed: Mapping[str, int]) -> Iterator[list[str]]:
    """Names, in their order, in groups that need no more memory than this together.

    Raises:
        ValueError: one of them needs more by itself.
    """
    group: list[str] = []
    size = 0
    for name, bytes_needed in needed.items():
        if bytes_needed > max_bytes:
            raise ValueError(
                f"max_bytes={max_bytes:,} is less than module {name!r} needs by itself, {bytes_needed:,}."
            )
        if size + bytes_needed > max_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += bytes_needed
    yield group
