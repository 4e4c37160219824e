"""Transforms by products with small matrices: for any layout of rows, in any mode, without a table of an axis's size.

A row's samples are cut into blocks of N = 2^j p samples. With the equivalent filter h and its offset o, see `filters`,
sample n of a block is

    Σ_i c[i] h[n + o - 2^j i],

and each block takes the same sum over coefficients that lie p further than those of the block before. So a level is
one batched product. Its left side holds each row's overlapping windows of coefficients, one for each block; its
right side is a small matrix that only wavelet, level and band determine. The adjoint is such a product too.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .constant_tensors import constant_tensors
from .filters import equivalent_filter, offset
from .layout import BANDS, Axis

SAMPLES = 32
"""Number of samples of a block, or 2^j if that is more. With 16 or 64 the products take as long or longer."""


def synthesise(coefficients: list[Tensor | None], axis: Axis) -> Tensor:
    """`synthesis` with `dim=1` of the rows of level 1 and coarser, (R, d). At least one level must have rows."""
    parts = []
    for level in range(axis.levels, 0, -1):
        rows = coefficients[level]
        if rows is None:
            continue
        matrices, first = _matrices(rows, axis, level, adjoint=False)  # (R_j, K, N)
        width, step = matrices.shape[1], matrices.shape[2] >> level
        # -(-a // b) rounds up: the last block may reach beyond the end, and `narrow` cuts it there.
        blocks = -(-axis.sizes[level] // step)
        after = (blocks - 1) * step + width + first - axis.sizes[level]
        windows = _continued(rows, -first, after).unfold(1, width, step)  # (R_j, blocks, K)
        parts.append(torch.bmm(windows, matrices).flatten(1).narrow(1, 0, axis.length))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def decompose(signal: Tensor, axis: Axis) -> list[Tensor | None]:
    """`adjoint` with `dim=1` of the rows of level 1 and coarser."""
    result: list[Tensor | None] = [None] * len(axis.bands)
    # On an axis of odd length synthesis trims one sample; the transpose of trimming appends a zero.
    whole = axis.sizes[1] * 2
    if whole > axis.length:
        signal = F.pad(signal, (0, whole - axis.length))
    start = 0
    for level in range(axis.levels, 0, -1):
        count, size = len(axis.bands[level]), axis.sizes[level]
        if not count:
            continue
        rows = signal.narrow(0, start, count)
        start += count
        matrices, first = _matrices(rows, axis, level, adjoint=True)  # (R_j, K, p)
        width, step = matrices.shape[1], matrices.shape[2] << level
        blocks = -(-size // matrices.shape[2])
        after = (blocks - 1) * step + width + first - whole
        windows = _continued(rows, -first, after).unfold(1, width, step)  # (R_j, blocks, K)
        result[level] = torch.bmm(windows, matrices).flatten(1).narrow(1, 0, size)
    return result


def _continued(rows: Tensor, before: int, after: int) -> Tensor:
    """The rows with `before` and `after` more columns of their periodic continuation at the two ends."""
    if not before and not after:
        return rows
    # A filter may be longer than the axis and wrap around it several times.
    size, more = rows.shape[1], max(before, after)
    ends = rows if more <= size else rows.repeat(1, -(-more // size))
    return torch.cat((ends.narrow(1, ends.shape[1] - before, before), rows, ends.narrow(1, 0, after)), 1)


def _matrices(rows: Tensor, axis: Axis, level: int, adjoint: bool) -> tuple[Tensor, int]:
    """The matrix of each row's band, and the position at which the window of the first block starts."""
    by_band = _band_matrices(axis.constants, rows, rows.dtype, axis.wavelet, level, adjoint)
    runs = [by_band[BANDS.index(band)].expand(count, -1, -1) for band, count in axis.runs[level]]
    return torch.cat(runs) if len(runs) > 1 else runs[0], _first(axis.wavelet, level, adjoint)


@constant_tensors
def _band_matrices(
    device: torch.device, dtype: torch.dtype, wavelet: str, level: int, adjoint: bool
) -> tuple[Tensor, ...]:
    """For each of the bands a and d: (K, N) for the synthesis, (K, p) for its adjoint."""
    return torch.tensor(_table(wavelet, level, adjoint), dtype=dtype, device=device).unbind()


# torch.compile cannot trace PyWavelets. It calls the two functions below while it compiles, and keeps their results.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _table(wavelet: str, level: int, adjoint: bool) -> list[list[list[float]]]:
    """One matrix for each band. Entry (k, n) is the tap between coefficient k of a window and sample n of its block.

    For the adjoint, entry (k, n) is the tap between sample k of a window and coefficient n of its block.
    """
    step, first = 2**level, _first(wavelet, level, adjoint)
    filters = [np.pad(equivalent_filter(wavelet, band, level)[0], 1) for band in BANDS]  # zero beyond their ends
    taps = len(filters[0]) - 2
    count = max(SAMPLES // step, 1)
    if adjoint:
        width = step * (count - 1) + taps
        at = np.arange(width)[:, None] - step * np.arange(count)
    else:
        last = (step * count - 1 + offset(wavelet, level)) // step
        at = np.arange(step * count) + offset(wavelet, level) - step * np.arange(first, last + 1)[:, None]
    return [own[np.clip(at, -1, taps) + 1].tolist() for own in filters]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _first(wavelet: str, level: int, adjoint: bool) -> int:
    """The position, 0 or less, of the first coefficient (for the adjoint: the first sample) of the first window."""
    taps, ahead = equivalent_filter(wavelet, "a", level)
    return -ahead if adjoint else (ahead - len(taps)) // 2**level + 1
