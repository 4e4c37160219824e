"""Filters of orthogonal wavelets, and the sum that all transforms here compute with them.

Level j trims if d_{j-1} is odd. If no level but the first trims, all steps from level j to the axis amount to one
equivalent filter h with an offset o. With n + o = 2^j q + p, where p is the phase of sample n,

    (S c)[n] = Σ_i c[i] h[n + o - 2^j i] = Σ_s c[q - s] t[s, p],        t[s, p] = h[2^j s + p],

over shifts s; places q - s of coefficients are taken modulo d_j. Each file computes this sum in its own way. `haar`
has one shift and no offset, so it needs one product. `one_step` lists all places q - s and taps for one kernel.
`elementwise` gathers both for some samples, or adds up the shifts one by one. `blocks` writes the first sum as a
product with a small matrix.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache

import numpy as np
import pywt
import torch
from torch import Tensor

from .layout import BANDS


@dataclass(frozen=True)
class Filters:
    """Synthesis filters of an orthogonal wavelet, `lo` (approximation) and `hi` (detail), of equal even length."""

    lo: tuple[float, ...]
    hi: tuple[float, ...]


@cache
def filters(wavelet: str) -> Filters:
    """Synthesis filters, as float64 numbers, of the orthogonal wavelet to which PyWavelets gives this name.

    `dmey` counts as orthogonal in PyWavelets, but its filters are approximations: S Sᵀ = I holds to 3e-3 only.

    Raises:
        ValueError: the name is unknown, or the wavelet is not orthogonal.
    """
    try:
        found = pywt.Wavelet(wavelet)
    except (ValueError, TypeError, AttributeError) as error:
        close = difflib.get_close_matches(str(wavelet), pywt.wavelist(kind="discrete"), n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "pywt.wavelist() lists all names."
        raise ValueError(f"wavelet={wavelet!r} is not a wavelet that PyWavelets knows; {hint}") from error
    if not found.orthogonal:
        raise ValueError(
            f"wavelet={wavelet!r} is not orthogonal; only orthogonal wavelets keep the norm of the factors. "
            "Use one of the families haar, db, sym or coif."
        )
    return Filters(tuple(found.rec_lo), tuple(found.rec_hi))


def max_useful_level(wavelet: str, length: int) -> int:
    """Largest level at which a filter does not wrap around an axis of this length (`pywt.dwt_max_level`)."""
    return int(pywt.dwt_max_level(length, len(filters(wavelet).lo)))


@cache
def equivalent_filter(wavelet: str, band: str, level: int) -> tuple[np.ndarray, int]:
    """The one filter to which `level` levels of synthesis amount, and its offset.

    With filters of length F, the steps from level j to the axis act as one filter h_j at stride 2^j. It is the
    convolution of the filters of the levels 1 to j, each spread out to its level's stride. Its length is
    K_j = (F - 1)(2^j - 1) + 1 and its offset o_j = (F / 2 - 1)(2^j - 1). A filter that is longer than
    the axis wraps around it.

    Returns:
        h_{j,band}, of shape (K_j,), in float64, and o_j.
    """
    found = filters(wavelet)
    result = np.ones(1)
    for finer in range(1, level + 1):
        taps = found.hi if (band, finer) == ("d", level) else found.lo
        spread = np.zeros((len(taps) - 1) * 2 ** (finer - 1) + 1)
        spread[:: 2 ** (finer - 1)] = taps
        result = np.convolve(result, spread)
    return result, (len(found.lo) // 2 - 1) * (2**level - 1)


def taps_by_phase(wavelet: str, band: str, level: int) -> np.ndarray:
    """The taps t[s, p] of the formula above, of shape (shifts, 2^level), filled up with zeros."""
    taps, _ = equivalent_filter(wavelet, band, level)
    return np.pad(taps, (0, -len(taps) % 2**level)).reshape(-1, 2**level)


# torch.compile cannot trace PyWavelets. It calls `offset` and `_table` while it compiles, and keeps their results.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def offset(wavelet: str, level: int) -> int:
    """The offset o, which both bands have."""
    return equivalent_filter(wavelet, "a", level)[1]


def taps_of_rows(device: torch.device, dtype: torch.dtype, wavelet: str, bands: str, level: int) -> Tensor:
    """The taps t of each row's band: (R, shifts, 2^level)."""
    table = torch.tensor(_table(wavelet, level), dtype=dtype, device=device)
    return table.index_select(0, torch.tensor([BANDS.index(band) for band in bands], device=device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _table(wavelet: str, level: int) -> list[list[list[float]]]:
    return [taps_by_phase(wavelet, band, level).tolist() for band in BANDS]
