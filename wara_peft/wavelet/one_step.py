"""Transforms of all levels in one step: every sample is a weighted sum of coefficients, of whatever level.

For axes on which no level but the first trims, so that a length of d' = 2^L d_L is cut to d at the very end; there
each level has one equivalent filter. Rows of one band that lie side by side share its taps. With the coefficients of
all levels as a table whose rows are such blocks, all sums are one `torch.nn.functional.embedding_bag`: one kernel, for
any wavelet and number of levels, and in float32 or better inside.

The places in the table and the taps take 8 bytes (of float32) for each of up to F taps of each block at each sample.
So layouts of few blocks only are transformed in this way, those that equal ranks make, whose blocks are the same ones
whatever the rank is: see `Axis.block_width`. All factors of the same length share them.
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

    torch.func cannot see into it.
    """
    return axis.block_width > 0 and rows.device.type in DEVICES and rows.dtype in DTYPES and is_plain(rows)


def synthesise(coefficients: list[Tensor | None], axis: Axis, dim: int) -> Tensor:
    """`synthesis` of the rows of level 1 and coarser, of which there is one: (R, d) with `dim=1`, (d, R) with `dim=0`.

    Args:
        coefficients: as in `synthesis`, without further dimensions.
        axis, dim: as in `synthesis`.
    """
    width = axis.block_width
    levels = [rows for rows in reversed(coefficients[1:]) if rows is not None]
    # Coefficients of a block one after the other where that transposes and joins levels at once; else as they lie.
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
    """Transpose of `synthesise`: for each level the rows of that level, or None where it has none.

    Args:
        signal: (R, d) with `dim=1`, (d, R) with `dim=0`.
        axis, dim: as in `synthesis`. What the axis says of level 0 does not matter.
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
    """The band of each block of level 1 and coarser; the same whatever rank all subbands have."""
    return ("", *(letters[:: axis.block_width] for letters in axis.bands[1:]))


def _levels_with_rows(bands: tuple[str, ...]) -> list[int]:
    """From level 1 on, coarsest first."""
    return [level for level in range(len(bands) - 1, 0, -1) if bands[level]]


@constant_tensors
def _synthesis_sums(
    device: torch.device, dtype: torch.dtype, wavelet: str, length: int, blocks: tuple[str, ...], by_block: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For each block at each sample: places in the table, their taps, and where each sum starts in these two."""
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
    """For each coefficient of each block: places in the signal, their taps, and where each sum starts in these two."""
    sizes = axis_sizes(length, len(blocks) - 1)
    all_blocks = sum(map(len, blocks))
    places, taps, counts, before = [], [], [], 0
    for level in _levels_with_rows(blocks):
        size, step, letters = sizes[level], 2**level, blocks[level]
        filters = [equivalent_filter(wavelet, band, level)[0] for band in letters]
        first = np.arange(size)[:, None] * step - offset(wavelet, level)
        needed = (first + np.arange(len(filters[0]))) % (size * step)  # (d_j, K_j)
        inside = needed < length  # the last sample is trimmed where d is odd
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
    return (
        torch.tensor(places.ravel(), dtype=torch.int32, device=device),
        torch.tensor(taps.ravel(), dtype=dtype, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
    )
