"""Checks of arguments that the attention and pooling modules share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_whole_number


def padding_positions(key_padding_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Check a padding mask, and return it as booleans of shape (batch, length), True = padding; None stays None.

    Args:
        key_padding_mask: a mask of shape (batch, length): booleans, or floats with -inf at padding and 0 elsewhere.
            `nn.TransformerEncoderLayer` turns boolean masks into floats before it calls its attention.
        batch, length: the shape that the mask must have.

    Raises:
        ValueError: the length is 0, the mask has another shape or dtype or other float values, or all positions of a
            row are padding. The values are not checked while `torch.compile` traces.
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
    # A branch that depends on a tensor's values would break the graph of torch.compile.
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
    """Raise an error for the first size that is not an int of at least 1; it is named by its keyword."""
    for name, size in sizes.items():
        check_whole_number(name, size)
