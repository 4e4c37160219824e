"""Transforms of all levels in one step each, with each level's equivalent filter: the fast path on CPUs.

A filter of length F at level j acts as one filter h_j of length K_j = (F − 1)(2^j − 1) + 1 at stride 2^j: the filters
of the levels below it, spread out and convolved with each other. Where 2^L divides the length d of the axis, the
periodised S_{j,band} is circular convolution with it,

    (S_{j,band} c)[n] = Σ_i c[i] h_{j,band}[n − 2^j i + o_j],      o_j = (F/2 − 1)(2^j − 1).

Three ways to compute this, chosen by measurement (`benchmarks/transform_time.py`): Haar's filters do not overlap, so a
product is enough; on short axes the matrix S_{j,band} itself is kept, and one product of matrices applies it to all
rows of a band; on long ones a convolution does, whatever F and j are. Lengths that 2^L does not divide, other
devices and compiled graphs are left to the polyphase steps in `wavelet.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import made_once

if TYPE_CHECKING:
    from .wavelet import Axis, Filters

LONGEST_MATRIX = 512
"""Length of axis up to which the matrices are kept; each band of level j takes d · d / 2^j numbers."""
SHORTEST_COLUMN = 1024
"""Length from which on convolutions are faster than the polyphase steps where columns are transformed."""


def covers(axis: Axis, filters: Filters, by_rows: bool) -> bool:
    """Whether these transforms serve an axis, and are faster than the polyphase steps.

    Args:
        axis, filters: the transform.
        by_rows: whether numbers that are neighbours on the axis are so in memory. Where they are not, Haar's product
            and convolutions of medium length are slower than the polyphase steps.
    """
    if not by_rows and (len(filters.lo) == 2 or LONGEST_MATRIX < axis.length < SHORTEST_COLUMN):
        return False
    return _fits(axis, filters)


@cache
def _fits(axis: Axis, filters: Filters) -> bool:
    """Whether 2^L divides the length, and no equivalent filter is longer than it."""
    return axis.length % 2**axis.levels == 0 and len(_equivalent(filters, "a", axis.levels)) <= axis.length


def synthesise(coefficients: Sequence[Tensor | None], axis: Axis, filters: Filters, dim: int) -> Tensor:
    """`wavelet.synthesis` of rows without further dimensions, of an axis that is covered."""
    parts: list[Tensor] = []
    for level in range(axis.levels, -1, -1):
        rows = coefficients[level]
        if rows is not None:
            rows = rows if dim == 1 else rows.T
            parts += _up(rows, axis, filters, level) if level else [rows]
    result = torch.cat(parts) if len(parts) > 1 else parts[0]
    return result if dim == 1 else result.T


def decompose(signal: Tensor, axis: Axis, filters: Filters, dim: int) -> list[Tensor | None]:
    """`wavelet.adjoint`, which here equals `wavelet.analysis`, likewise."""
    signal = signal if dim == 1 else signal.T
    result: list[Tensor | None] = [None] * len(axis.bands)
    start = 0
    for level in range(axis.levels, -1, -1):
        count = len(axis.bands[level])
        if count:
            rows = signal.narrow(0, start, count)
            start += count
            if level:
                parts = _down(rows, axis, filters, level)
                rows = torch.cat(parts) if len(parts) > 1 else parts[0]
            result[level] = rows if dim == 1 else rows.T
    return result


def _up(rows: Tensor, axis: Axis, filters: Filters, level: int) -> list[Tensor]:
    """S_{j,band} times each of the rows (R_j, d_j), which gives (R_j, d), in one part or several."""
    bands = axis.bands[level]
    if len(filters.lo) == 2:  # each coefficient fills a place of its own, of 2^j samples
        return [(rows.unsqueeze(2) * _tensor(filters, bands, level, rows.dtype, rows.device)).flatten(1)]
    if axis.length > LONGEST_MATRIX:
        return [_convolve_up(rows, _tensor(filters, bands, level, rows.dtype, rows.device), level)]
    return [
        rows.narrow(0, start, count) @ _matrix(filters, band, level, axis.length, rows.dtype, rows.device)
        for band, start, count in _runs(bands)
    ]


def _down(rows: Tensor, axis: Axis, filters: Filters, level: int) -> list[Tensor]:
    """Transpose of `_up`: (R_j, d) to (R_j, d_j)."""
    bands = axis.bands[level]
    if len(filters.lo) == 2:
        weights = _tensor(filters, bands, level, rows.dtype, rows.device)
        return [torch.bmm(rows.reshape(len(rows), -1, 2**level), weights.transpose(1, 2)).squeeze(2)]
    if axis.length > LONGEST_MATRIX:
        return [_convolve_down(rows, _tensor(filters, bands, level, rows.dtype, rows.device), level)]
    return [
        rows.narrow(0, start, count) @ _matrix(filters, band, level, axis.length, rows.dtype, rows.device).T
        for band, start, count in _runs(bands)
    ]


def _runs(bands: str) -> Iterator[tuple[str, int, int]]:
    """Neighbouring rows of one band: band, first row, number of rows."""
    start = 0
    for band, letters in groupby(bands):
        count = len(list(letters))
        yield band, start, count
        start += count


def _convolve_up(rows: Tensor, weights: Tensor, level: int) -> Tensor:
    """Upsample rows by 2^level and convolve them circularly with their weights, (R, 1, K_j)."""
    length, size, stride = weights.shape[2], rows.shape[1], 2**level
    offset = _offset(length, level)
    before = (length - 1 - offset) // stride
    after = (size * stride - 1 + offset) // stride - (size - 1)
    padded = torch.cat((rows[:, size - before :], rows, rows[:, :after]), 1)
    result = F.conv_transpose1d(padded.unsqueeze(0), weights, stride=stride, groups=len(rows))[0]
    return result.narrow(1, offset + stride * before, size * stride)


def _convolve_down(rows: Tensor, weights: Tensor, level: int) -> Tensor:
    """Transpose of `_convolve_up`."""
    length, stride = weights.shape[2], 2**level
    offset = _offset(length, level)
    padded = torch.cat((rows[:, rows.shape[1] - offset :], rows, rows[:, : length - stride - offset]), 1)
    return F.conv1d(padded.unsqueeze(0), weights, stride=stride, groups=len(rows))[0]


def _offset(length: int, level: int) -> int:
    """o_j, from K_j = (F − 1)(2^j − 1) + 1."""
    steps: int = 2**level - 1
    filter_length = (length - 1) // steps + 1
    return (filter_length // 2 - 1) * steps


@cache
def _equivalent(filters: Filters, band: str, level: int) -> np.ndarray:
    """h_{j,band}, of length K_j."""
    result = np.ones(1)
    for finer in range(1, level + 1):
        taps = filters.hi if (band, finer) == ("d", level) else filters.lo
        spread = np.zeros((len(taps) - 1) * 2 ** (finer - 1) + 1)
        spread[:: 2 ** (finer - 1)] = taps
        result = np.convolve(result, spread)
    return result


@made_once
def _tensor(filters: Filters, bands: str, level: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The equivalent filter of each row's band: (R, 1, K_j)."""
    weights = np.stack([_equivalent(filters, band, level) for band in bands])[:, None]
    return torch.tensor(weights, dtype=dtype, device=device)


@made_once
def _matrix(filters: Filters, band: str, level: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """S_{j,band}ᵀ: (d_j, d)."""
    taps = _equivalent(filters, band, level)
    offset = (len(filters.lo) // 2 - 1) * (2**level - 1)
    matrix = np.zeros((length >> level, length))
    for row in range(len(matrix)):
        np.add.at(matrix[row], ((row << level) + np.arange(len(taps)) - offset) % length, taps)
    return torch.tensor(matrix, dtype=dtype, device=device)
