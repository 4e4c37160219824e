"""Transforms of all levels in one step: every sample is a weighted sum of coefficients of one level or another.

These transforms serve axes on which no level but the first trims. There each level has one equivalent filter, and a
length of d' = 2^L d_L is cut to d at the very end. A block is a group of neighbouring rows in one band, which share
the taps of that band. The coefficients of all levels are one table, whose rows hold the coefficients of one block at
one place. Then `torch.nn.functional.embedding_bag` computes all sums at once. It is one kernel for any wavelet and
number of levels, and adds up in float32 or better.

Places in the table and taps take 8 bytes (with float32) for each of up to F taps of each block at each sample. So only
layouts of few blocks are transformed in this way, namely those that equal ranks make (see `Axis.block_width`). Their
blocks do not depend on the rank, so all factors of the same length share places and taps.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .constant_tensors import constant_tensors
from .filters import equivalent_filter, offset, taps_by_phase
from .layout import Axis, axis_sizes
from .modes import is_plain

DEVICES = ("cpu", "cuda", "meta")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def serves(rows: Tensor, axis: Axis) -> bool:
    """Whether rows are transformed in one step: plain tensors in few blocks, on a device and of a dtype with a kernel.

    Tensors must be plain, since torch.func cannot transform that kernel.
    """
    return axis.block_width > 0 and rows.device.type in DEVICES and rows.dtype in DTYPES and is_plain(rows)


def synthesise(coefficients: list[Tensor | None], axis: Axis, dim: int) -> Tensor:
    """`synthesis` of the rows of level 1 and coarser: (R, d) with `dim=1`, (d, R) with `dim=0`.

    At least one level must have rows.

    Args:
        coefficients: as in `synthesis`, without further dimensions.
        axis, dim: as in `synthesis`.
    """
    width = axis.block_width
    levels = [rows for rows in reversed(coefficients[1:]) if rows is not None]
    # The table has one block after the other if one `cat` can then both transpose and join levels. Otherwise blocks
    # alternate, as the coefficients lie in memory. Either way there is one copy at most.
    by_block = dim == 1 and len(levels) > 1
    if by_block:
        table = torch.cat([block.T for rows in levels for block in rows.split(width)])
    else:
        parts = [(rows.T if dim == 1 else rows).reshape(-1, width) for rows in levels]
        table = torch.cat(parts) if len(parts) > 1 else parts[0]
    blocks = _blocks(axis)
    places, taps, starts = _synthesis_sums(
        axis.constants, table, table.dtype, axis.wavelet, axis.length, blocks, by_block
    )
    sums = F.embedding_bag(places, table, starts, mode="sum", per_sample_weights=taps)
    result = sums.view(axis.length, axis.transformed_rows)
    return result.T if dim == 1 else result


def decompose(signal: Tensor, axis: Axis, dim: int) -> list[Tensor | None]:
    """Transpose of `synthesise`. For each level it returns the rows, or None if the level has none.

    Args:
        signal: (R, d) with `dim=1`, (d, R) with `dim=0`.
        axis, dim: as in `synthesis`. Rows of level 0 are ignored.
    """
    width = axis.block_width
    table = (signal.T if dim == 1 else signal).reshape(-1, width)  # (d · blocks, width)
    places, taps, starts = _adjoint_sums(
        axis.constants, table, table.dtype, axis.wavelet, axis.length, _blocks(axis), dim
    )
    sums = F.embedding_bag(places, table, starts, mode="sum", per_sample_weights=taps)
    result: list[Tensor | None] = [None] * len(axis.bands)
    start = 0
    for level in _levels_with_rows(axis.bands):
        count, size = len(axis.bands[level]), axis.sizes[level]
        own = sums.narrow(0, start, count // width * size)
        start += len(own)
        if dim == 1:
            result[level] = own.view(-1, size, width).transpose(1, 2).reshape(count, size)
        else:
            result[level] = own.view(size, count)
    return result


def _blocks(axis: Axis) -> tuple[str, ...]:
    """For each level the band of each block; level 0 has none. The rank of the subbands does not change the result."""
    return ("", *(letters[:: axis.block_width] for letters in axis.bands[1:]))


def _levels_with_rows(bands: tuple[str, ...]) -> list[int]:
    """The levels from 1 on that have rows, coarsest first."""
    return [level for level in range(len(bands) - 1, 0, -1) if bands[level]]


@constant_tensors
def _synthesis_sums(
    device: torch.device, dtype: torch.dtype, wavelet: str, length: int, blocks: tuple[str, ...], by_block: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Places in the table and their taps, for each block at each sample, and the start of each sum in these two."""
    sizes = axis_sizes(length, len(blocks) - 1)
    places, taps, before = [], [], 0
    for level in _levels_with_rows(blocks):
        size, step, count = sizes[level], 2**level, len(blocks[level])
        for block, band in enumerate(blocks[level]):
            by_phase = taps_by_phase(wavelet, band, level).T  # (2^j, shifts)
            at = np.arange(length) + offset(wavelet, level)
            needed = (at[:, None] // step - np.arange(by_phase.shape[1])) % size  # (d, shifts)
            places.append(before + (needed + block * size if by_block else needed * count + block))
            taps.append(by_phase[at % step])
        before += size * count
    counts = np.tile([block.shape[1] for block in places], length)
    return _tensors(device, dtype, np.concatenate(places, 1), np.concatenate(taps, 1), counts)


@constant_tensors
def _adjoint_sums(
    device: torch.device, dtype: torch.dtype, wavelet: str, length: int, blocks: tuple[str, ...], dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Places in the signal and their taps, for each coefficient of each block, and the start of each sum."""
    sizes = axis_sizes(length, len(blocks) - 1)
    all_blocks = sum(map(len, blocks))
    places, taps, counts, before = [], [], [], 0
    for level in _levels_with_rows(blocks):
        size, step, letters = sizes[level], 2**level, blocks[level]
        filters = [equivalent_filter(wavelet, band, level)[0] for band in letters]
        first = np.arange(size)[:, None] * step - offset(wavelet, level)
        needed = (first + np.arange(len(filters[0]))) % (size * step)  # (d_j, K_j)
        # If d is odd, the last sample was trimmed. Its tap becomes 0, and its place any that exists.
        inside = needed < length
        own_places = np.minimum(needed, length - 1) * all_blocks
        order = 0 if dim == 1 else 1  # blocks of coefficients, or coefficients of blocks
        places.append(np.stack([own_places + before + block for block in range(len(letters))], order).ravel())
        taps.append(np.stack([own * inside for own in filters], order).ravel())
        counts.append(np.full(size * len(letters), len(filters[0])))
        before += len(letters)
    return _tensors(device, dtype, np.concatenate(places), np.concatenate(taps), np.concatenate(counts))


def _tensors(
    device: torch.device, dtype: torch.dtype, places: np.ndarray, taps: np.ndarray, counts: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    starts = np.cumsum(counts) - counts
    # int32 halves the memory of the places; `embedding_bag` wants places and starts to have the same dtype.
    return (
        torch.tensor(places.ravel(), dtype=torch.int32, device=device),
        torch.tensor(taps.ravel(), dtype=dtype, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
    )
