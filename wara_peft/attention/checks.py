"""What the modules of this package check of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_whole_number


def padding_positions(key_padding_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return which positions are padding as booleans of shape (batch, length), True = padding, or None for no mask.

    Args:
        key_padding_mask: booleans, or floats with -inf at padding and 0 elsewhere (`nn.TransformerEncoderLayer` turns
            its mask into such), of shape (batch, length).
        batch, length: the shape that the mask must have.

    Raises:
        ValueError: there are no positions at all, the mask has another shape or dtype or other float values, or a
            row is padding from end to end. The values are not checked while `torch.compile` traces.
    """
    if length == 0:
        raise ValueError("The sequence has length 0, so there is nothing to attend to; pass at least one token.")
    if key_padding_mask is None:
        return None
    if key_padding_mask.shape != (batch, length):
        raise ValueError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be (batch, length) = "
            f"{(batch, length)}, True where a position is padding."
        )
    if key_padding_mask.dtype == torch.bool:
        padding = key_padding_mask
    elif key_padding_mask.is_floating_point():
        padding = key_padding_mask == -torch.inf
    else:
        raise ValueError(
            f"key_padding_mask has dtype {key_padding_mask.dtype}; pass booleans, True where a position is padding "
            "(for a tokenizer's attention_mask that is `attention_mask == 0`)."
        )
    # Looking at values would break the graph of torch.compile.
    if not torch.compiler.is_compiling():
        if key_padding_mask.is_floating_point() and not bool((padding | (key_padding_mask == 0)).all()):
            raise ValueError(
                "A key_padding_mask of floats may hold 0 and -inf only; pass booleans, True where there is padding."
            )
        empty = padding.all(1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"key_padding_mask leaves no position in rows {empty[:5]}{' and more' * (len(empty) > 5)}: attention "
                "over nothing has no value. Drop these rows, or keep at least one token of each."
            )
    return padding


def check_positive(**sizes: int) -> None:
    """Refuse the first of the sizes that is no int of at least 1."""
    for name, size in sizes.items():
        check_whole_number(name, size)
