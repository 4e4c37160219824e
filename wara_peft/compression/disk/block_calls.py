"""Calls of the blocks of a model, and a module that runs one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.input_moments import input_of
from ...messages import first_few

REMEDY = "Load the model, and call calibrate and compress."
STORABLE = (Tensor, str, int, float, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments with which a model calls a block, with None in place of the hidden states, which come first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Tensor]:
        """Take the hidden states out of the arguments of the block of that name."""
        hidden = input_of(args, kwargs)
        first = next(iter(kwargs), "")
        if not isinstance(hidden, Tensor):
            raise ValueError(f"{name!r} gets no hidden states first, but a {type(hidden).__name__}. {REMEDY}")
        call = cls((None, *args[1:]), kwargs) if args else cls((), {**kwargs, first: None})
        call.check_storable(name)
        return call, hidden

    def check_storable(self, name: str) -> None:
        """Refuse arguments that are no tensors, numbers or texts."""
        wrong = {type(value).__name__ for value in _unstorable([*self.args, *self.kwargs.values()])}
        if wrong:
            raise ValueError(f"{name!r} gets {first_few(sorted(wrong))}, which no file of inputs can hold. {REMEDY}")

    def __call__(self, block: nn.Module, hidden: Tensor) -> Any:
        if self.args:
            return block(hidden, *self.args[1:], **self.kwargs)
        return block(**{**self.kwargs, next(iter(self.kwargs)): hidden})


def _unstorable(value: Any) -> Iterator[Any]:
    """Give what files of `StoredInputs` cannot hold."""
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _unstorable(item)
    elif not isinstance(value, STORABLE):
        yield value


class BlockModel(nn.Module):
    """Makes a model of one block, which `measure` can run: its batches are those of `StoredInputs`.

    Attributes:
        keep: takes the hidden states that the block gives for each batch.
    """

    main_input_name = "hidden"

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.keep: Callable[[Tensor], object] | None = None

    def forward(self, hidden: Tensor, call: Call, attention_mask: Tensor | None = None) -> None:
        found = hidden_of(call(self.block, hidden))
        if self.keep is not None:
            self.keep(found)


def hidden_of(output: Any) -> Tensor:
    """Give the hidden states in a block's output: a tensor, or the only one in a tuple or list.

    Raises:
        ValueError: there are none, or further tensors, which later blocks would need.
    """
    found = [output] if isinstance(output, Tensor) else _tensors(output)
    if len(found) != 1:
        raise ValueError(f"A block gives {len(found)} tensors, not only hidden states. {REMEDY}")
    return found[0]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Give a block's output with other hidden states in it."""
    if isinstance(output, Tensor):
        return hidden
    return type(output)(hidden if isinstance(item, Tensor) else item for item in output)
