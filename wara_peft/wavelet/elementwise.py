"""Synthesis by elementwise operations. It computes single samples, or writes into a tensor that the caller gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .constant_tensors import constant_tensors
from .filters import offset, taps_of_rows
from .layout import Axis


def samples(coefficients: Sequence[Tensor | None], axis: Axis, positions: Tensor) -> Tensor:
    """The samples that `synthesis` with `dim=1` has at N positions, rows of level 0 included: (R, N).

    For each position this gathers the coefficients q - s and the taps of the phase p, as `filters` defines them.
    """
    last = axis.last_level_at_once
    finer, coarser = axis.split(last) if last else (axis, None)
    parts = []
    for level in range(finer.levels, 0, -1):
        bands = finer.bands[level]
        if not bands:
            continue
        # The rows of the level at which the axis is split may all come from coarser levels.
        sample = next(rows for rows in coefficients[level:] if rows is not None)
        (taps,) = _taps(axis.constants, sample, sample.dtype, axis.wavelet, bands, level)  # (R_j, shifts, 2^j)
        shifts = torch.arange(taps.shape[1], device=positions.device)[:, None]
        place = positions + offset(axis.wavelet, level)
        needed = (place // 2**level - shifts).remainder(finer.sizes[level]).flatten()  # (shifts · N,)
        rows = coefficients[level]
        if coarser is not None and level == last:
            values = samples(coefficients[last:], coarser, needed)
        else:
            assert rows is not None
            values = rows.index_select(1, needed)
        values = values.view(len(bands), len(shifts), len(positions))  # (R_j, shifts, N)
        parts.append((values * taps.index_select(2, place % 2**level)).sum(1))
    if coefficients[0] is not None:
        parts.append(coefficients[0].index_select(1, positions))
    return torch.cat(parts)


def writes_in_place(out: Tensor, coefficients: Sequence[Tensor | None], axis: Axis) -> bool:
    """Whether `synthesise_into` can be used: matrices of one dtype, float32 or float64, on an axis that 2^L divides.

    `synthesise_into` adds up in the dtype of `out`, and would lose digits in less than float32.
    """
    rows = [part for part in coefficients if part is not None]
    return (
        axis.length % 2**axis.levels == 0
        and out.dtype in (torch.float32, torch.float64)
        and all(part.ndim == 2 and part.dtype == out.dtype for part in rows)
    )


def synthesise_into(out: Tensor, coefficients: Sequence[Tensor | None], axis: Axis) -> None:
    """Write `synthesis` with `dim=1`, rows of level 0 included, into `out`, (R, d), without a tensor in between.

    Samples are seen as blocks of 2^j. For each shift s, one operation on all blocks adds a tap times the coefficient
    that lies s blocks before. If the offset o is b more than a multiple of 2^j, the last b samples of each block take
    coefficients that lie one further.
    """
    start = 0
    for level in range(axis.levels, -1, -1):
        rows = coefficients[level]
        if rows is None:
            continue
        own = out.narrow(0, start, len(rows))
        start += len(rows)
        if not level:
            own.copy_(rows)
            continue
        (taps,) = _taps(axis.constants, rows, rows.dtype, axis.wavelet, axis.bands[level], level)  # (R_j, shifts, 2^j)
        size, step = axis.sizes[level], 2**level
        blocks = own.unflatten(1, (size, step))
        whole, rest = divmod(offset(axis.wavelet, level), step)
        for first, end, ahead in ((0, step - rest, whole), (step - rest, step, whole + 1)):
            phase = (first + rest) % step
            for shift in range(taps.shape[1] if end > first else 0):
                tap = taps[:, shift, None, phase : phase + end - first]
                # Two slices are the rotation of the coefficients by `behind`; `roll` would allocate.
                behind = (shift - ahead) % size
                for to, at, length in ((behind, 0, size - behind), (0, size - behind, behind)):
                    if length:
                        target = blocks[:, to : to + length, first:end]
                        values = rows[:, at : at + length, None]
                        if shift:
                            target.addcmul_(values, tap)
                        else:
                            torch.mul(values, tap, out=target)


@constant_tensors
def _taps(device: torch.device, dtype: torch.dtype, wavelet: str, bands: str, level: int) -> tuple[Tensor]:
    """Taps of each row: (R, shifts, 2^level)."""
    return (taps_of_rows(device, dtype, wavelet, bands, level),)
