"""Scores the directions of each subband, from the gradient of a weight or the covariance of a layer's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..linear_algebra.svd import largest_singular
from ..wavelet import Subband, into_band


class Spectrum(NamedTuple):
    """The gains of one subband's directions, in float64.

    Attributes:
        gains: the largest gains in descending order, (count,).
        energy: the sum of all gains of the subband, including the small ones that `gains` omits, ().
    """

    gains: Tensor
    energy: Tensor


def energies_of_gradient(gradient: Tensor, wavelet: str, counts: Mapping[str, int]) -> dict[str, Spectrum]:
    """Give the squares of the largest singular values of S_outᵀ G S_in for each subband s.

    With ΔW = Σ_s S_out C_s S_inᵀ and G = ∂loss/∂W, this matrix is the gradient of the coefficients C_s.

    Args:
        gradient: G, (m, n), the gradient of the weight.
        wavelet: name of an orthogonal wavelet.
        counts: how many values to give for each subband, by its name.
    """
    found = {}
    # Several subbands have the same input side (aa1 and da1, for example): G S_in is computed once for them.
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
    """Give the largest eigenvalues of S_inᵀ C S_in for each subband, divided by the sum of all eigenvalues.

    The sum runs over all subbands in `counts`, so that modules with large inputs do not outbid the others.

    Args:
        covariance: C, (n, n), the covariance of the inputs.
        wavelet, counts: see `energies_of_gradient`.
    """
    found: dict[str, Spectrum] = {}
    by_band: dict[tuple[int, str], Tensor] = {}
    for name, count in counts.items():
        band = Subband.named(name)
        key = band.level, band.in_band
        if key not in by_band:
            half = into_band(covariance, wavelet, *key)  # (n, n_j)
            whole = into_band(half.T.contiguous(), wavelet, *key)  # (n_j, n_j)
            # A covariance has no negative eigenvalues; rounding may give tiny ones.
            by_band[key] = torch.linalg.eigvalsh(whole.double()).clamp(min=0).flip(0)
        found[name] = Spectrum(by_band[key][:count], by_band[key].sum())
    total = torch.stack([spectrum.energy for spectrum in found.values()]).sum()
    scale = torch.where(total > 0, 1 / total, 0)
    return {name: Spectrum(gains * scale, energy * scale) for name, (gains, energy) in found.items()}
