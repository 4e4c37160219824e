"""Takes batches apart into their samples, so that a model can be run for each one by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import honor_type
from torch import Tensor, nn


def samples_of(model: nn.Module, batch: Any) -> Iterator[Any]:
    """Give each sample of a batch as a batch of one, of the same structure.

    Samples lie along dimension 0 of tensors, and along lists of texts. A tensor with one entry serves all samples, and
    so does what is neither a tensor nor a list of texts. The number of samples is that of the model's main input, as
    transformers names it, or else of the first tensor.

    Raises:
        ValueError: tensors have different numbers of entries, or there are none.
    """
    main = getattr(model, "main_input_name", None)
    is_named = isinstance(batch, Mapping) and main in batch
    lengths = list(_lengths(batch))
    count = next(_lengths(batch[main]) if is_named else iter(lengths), 0)
    if is_named and count == 1:
        yield batch  # there is nothing to take apart, whatever the lengths of other tensors mean
        return
    others = [length for length in lengths if length not in (1, count)]
    if others or not count:
        found = f"tensors of {count} and of {others[0]} entries" if others else "no tensors"
        raise ValueError(
            f"A batch, a {type(batch).__name__}, has {found}, so its samples cannot be told apart, but "
            "each must run by itself. Give batches whose tensors have one entry for each sample "
            "along dimension 0, or batches of one sample with the model's main input in it by name."
        )
    for index in range(count):
        yield _sample(batch, index, count)


def may_hold_square_mask(batch: Any) -> bool:
    """Whether a tensor of a batch may be a mask with as many samples as positions.

    The shape of such a mask does not tell a layer whose inputs have samples first from one with positions first.
    """
    return any(
        leaf.dim() == 2 and len(leaf) == leaf.shape[1] > 1 and bool((leaf == 0).any())
        for leaf in _leaves(batch)
        if isinstance(leaf, Tensor)
    )


def _leaves(value: Any) -> Iterator[Any]:
    """Give the tensors and the lists of texts in a batch."""
    if isinstance(value, Tensor) or _are_texts(value):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)


def _lengths(value: Any) -> Iterator[int]:
    return (len(leaf) for leaf in _leaves(value) if not isinstance(leaf, Tensor) or leaf.dim())


def _sample(value: Any, index: int, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.dim() and len(value) == count else value
    if _are_texts(value):
        return value[index : index + 1] if len(value) == count else value
    if isinstance(value, Mapping):
        return type(value)({key: _sample(item, index, count) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, (list, tuple)):
        return honor_type(value, (_sample(item, index, count) for item in value))
    return value


def _are_texts(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and len(value) > 0 and all(isinstance(item, str) for item in value)


@contextmanager
def refusing_sequence_first(model: nn.Module) -> Iterator[None]:
    """Context in which a model that runs one sample is refused if an attention or RNN takes it for many.

    If dimension 0 of a batch holds positions, one entry of it looks to the module like many samples of one position.
    """
    kinds = (nn.MultiheadAttention, nn.RNNBase)
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, kinds) and not module.batch_first
    }

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if isinstance(inputs, Tensor) and inputs.dim() == 3 and len(inputs) == 1 < inputs.shape[1]:
            raise ValueError(
                f"{names[module]!r} has batch_first=False and gets one position of {inputs.shape[1]} samples where "
                "one sample runs by itself. Give batches with samples along dimension 0, and pass "
                "loss_fn(model, batch), which transposes them for the model."
            )

    handles = [module.register_forward_pre_hook(check, with_kwargs=True) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
