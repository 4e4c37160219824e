"""Filters of orthogonal wavelets, and what several levels of them amount to."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache

import numpy as np
import pywt


@dataclass(frozen=True)
class Filters:
    """Synthesis filters of an orthogonal wavelet, `lo` (approximation) and `hi` (detail), of equal even length."""

    lo: tuple[float, ...]
    hi: tuple[float, ...]


@cache
def filters(wavelet: str) -> Filters:
    """Synthesis filters of the orthogonal wavelet of that PyWavelets name, as float64 numbers.

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
    """Largest level at which a filter does not wrap around an axis of that length (`pywt.dwt_max_level`)."""
    return int(pywt.dwt_max_level(length, len(filters(wavelet).lo)))


@cache
def equivalent_filter(wavelet: str, band: str, level: int) -> tuple[np.ndarray, int]:
    """The one filter that `level` levels of synthesis amount to, and its offset.

    A filter of length F at level j acts as one filter h_j of length K_j = (F - 1)(2^j - 1) + 1 at stride 2^j: the
    filters of the levels below it, spread out and convolved with each other. Where no level trims,

        (S_{j,band} c)[n] = Σ_i c[i] h_{j,band}[n - 2^j i + o_j],      o_j = (F / 2 - 1)(2^j - 1),

    with n modulo the length. A filter that is longer than the axis wraps around it.

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
