"""The sum that all transforms here compute, and its taps.

On an axis on which no level but the first trims, level j has one equivalent filter h and its offset o. With
n + o = 2^j q + p, where p is the phase of sample n,

    (S c)[n] = Σ_i h[n + o - 2^j i] c[i] = Σ_s t[s, p] c[q - s],        t[s, p] = h[2^j s + p],

over shifts s, with places of coefficients modulo d_j. `haar` has one shift and no offset, and so one product;
`one_step` lists all places q - s and taps for one kernel; `elementwise` gathers both for some samples, or adds up the
shifts one by one; `blocks` writes the first sum as a product with a small matrix.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .filters import equivalent_filter
from .layout import BANDS


def taps_by_phase(wavelet: str, band: str, level: int) -> np.ndarray:
    """t, of shape (shifts, 2^level), filled up with zeros."""
    taps, _ = equivalent_filter(wavelet, band, level)
    return np.pad(taps, (0, -len(taps) % 2**level)).reshape(-1, 2**level)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def offset(wavelet: str, level: int) -> int:
    """o, which is that of both bands."""
    return equivalent_filter(wavelet, "a", level)[1]


def taps_of_rows(device: torch.device, dtype: torch.dtype, wavelet: str, bands: str, level: int) -> Tensor:
    """t of each row's band: (R, shifts, 2^level)."""
    table = torch.tensor(_table(wavelet, level), dtype=dtype, device=device)
    return table.index_select(0, torch.tensor([BANDS.index(band) for band in bands], device=device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _table(wavelet: str, level: int) -> list[list[list[float]]]:
    return [taps_by_phase(wavelet, band, level).tolist() for band in BANDS]
