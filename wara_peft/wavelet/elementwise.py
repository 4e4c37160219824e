"""Single samples of a synthesis, by elementwise operations: only the coefficients that they need are read."""

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


@constant_tensors
def _taps(device: torch.device, dtype: torch.dtype, wavelet: str, bands: str, level: int) -> tuple[Tensor]:
    """Taps of each row: (R, shifts, 2^level)."""
    return (taps_of_rows(device, dtype, wavelet, bands, level),)
