"""Running a model over batches to measure it: modes, arguments, losses and gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

OR_LOSS_FN = ", or pass loss_fn(model, batch), which calls the model and gives the loss"
LossFunction = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch, and gives the loss, a scalar."""


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Context in which all modules are in evaluation mode, without dropout. Each then goes back to its own mode."""
    training = {module: module.training for module in model.modules()}
    # In evaluation mode PyTorch's encoders leave padding out by nested tensors, which layers with hooks cannot take.
    encoders: list[Any] = [module for module in training if isinstance(module, nn.TransformerEncoder)]
    nested = [encoder.use_nested_tensor for encoder in encoders]
    model.eval()
    try:
        for encoder in encoders:
            encoder.use_nested_tensor = False
        yield
    finally:
        for encoder, uses in zip(encoders, nested, strict=True):
            encoder.use_nested_tensor = uses
        for module, mode in training.items():
            module.training = mode


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as arguments of a model: a mapping gives keyword arguments, a list, tuple or tensor positional ones."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def run_model(model: nn.Module, batch: Any, remedy: str = "") -> Any:
    """Give a model's output for a batch.

    Raises:
        ValueError: the model's `forward` does not take the arguments that the batch gives; `remedy` ends the message.
    """
    args, kwargs = arguments_of(batch)
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
        inspect.signature(base.forward).bind_partial(*args)  # the forward of a PEFT model takes anything
    except TypeError as error:
        found = f"keys {', '.join(map(repr, kwargs))}" if kwargs else f"{len(args)} entries"
        raise ValueError(
            f"A batch, a {type(batch).__name__} with {found}, does not fit the forward of {type(base).__name__}: "
            f"{error}. Give batches of what the model takes, without targets that it does not use{remedy}."
        ) from error
    return model(*args, **kwargs)


@contextmanager
def with_frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Context in which no parameter requires gradients. Each then gets its own `requires_grad` back."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> Tensor:
    """The result of `loss_fn(model, batch)`, or, without a `loss_fn`, the `loss` in the model's output for a batch.

    Raises:
        ValueError: the model's output has no loss, or the loss is no scalar.
    """
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)
    else:
        output = run_model(model, batch, OR_LOSS_FN)
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
    """Have `receive` called with the gradient of a layer's output; return the output that takes its place.

    A forward hook of the layer calls this, and returns its result.
    """
    if not output.requires_grad:
        # The copy is no leaf. Autograd refuses to change a leaf in place, as later layers may do.
        output = output.requires_grad_().clone()
    if output.requires_grad:  # not so under `no_grad`
        output.register_hook(receive)  # type: ignore[no-untyped-call]
    return output


def groups_within(max_bytes: int, needed: Mapping[str, int]) -> Iterator[list[str]]:
    """Split names, in their order, into groups that need no more than `max_bytes` of memory each.

    Raises:
        ValueError: one name needs more by itself.
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
