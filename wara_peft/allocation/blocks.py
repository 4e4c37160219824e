"""Spectra of the subbands of a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..linear_algebra.svd import largest_singular
from ..wavelet import Subband, into_band


class Spectrum(NamedTuple):
    """Of one subband: the largest gains in descending order, and the sum of all, (count,) and (), in float64."""

    gains: Tensor
    energy: Tensor


def energies_of_gradient(gradient: Tensor, wavelet: str, counts: Mapping[str, int]) -> dict[str, Spectrum]:
    """Squares of the largest singular values of the gradient of each C_s, S_outᵀ G S_in, for ΔW = Σ_s S_out C_s S_inᵀ.

    Args:
        gradient: G, (m, n), that of the weight.
        wavelet: name of an orthogonal wavelet.
        counts: how many values of each subband.
    """
    found = {}
    half: dict[tuple[int, str], Tensor] = {}
    for name, count in counts.items():
        band = Subband.named(name)
        key = band.level, band.in_band
        if key not in half:
            half[key] = into_band(gradient, wavelet, *key).T.contiguous()  # (n_j, m)
        block = into_band(half[key], wavelet, band.level, band.out_band).double()  # (n_j, m_j)
        found[name] = Spectrum(largest_singular(block, count, exact=False)[1].square(), block.square().sum())
    return found


def energies_of_inputs(covariance: Tensor, wavelet: str, counts: Mapping[str, int]) -> dict[str, Spectrum]:
    """Largest eigenvalues of S_inᵀ C S_in, as shares of the sum of those of all these subbands.

    Args:
        covariance: C, (n, n), that of the inputs.
        wavelet, counts: as in `energies_of_gradient`.
    """
    found: dict[str, Spectrum] = {}
    by_band: dict[tuple[int, str], Tensor] = {}
    for name, count in counts.items():
        band = Subband.named(name)
        key = band.level, band.in_band
        if key not in by_band:
            half = into_band(covariance, wavelet, *key)  # (n, n_j)
            whole = into_band(half.T.contiguous(), wavelet, *key)  # (n_j, n_j)
            by_band[key] = torch.linalg.eigvalsh(whole.double()).clamp(min=0).flip(0)
        found[name] = Spectrum(by_band[key][:count], by_band[key].sum())
    total = torch.stack([spectrum.energy for spectrum in found.values()]).sum()
    scale = torch.where(total > 0, 1 / total, 0)
    return {name: Spectrum(gains * scale, energy * scale) for name, (gains, energy) in found.items()}
