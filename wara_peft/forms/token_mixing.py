"""The wavelet transform over the grid of patch tokens: each subband of the tokens has its own low-rank pair.

A sequence is `prefix` tokens, and then H x W patches, row by row. P_s takes the subband s of the patches: it is
synthesis ∘ analysis of the 2-D transform over the grid, restricted to that subband. Then

    result = base(x) + scaling · Σ_s B_s P_s(A_s x),        Σ_s P_s = I at every size,

P_s acts on tokens, and A_s and B_s act on features. So x is projected to R channels first, and only these channels go
through the wavelet. P_s of the subband s = (p q j) is separable, P^H_{j,p} ⊗ P^W_{j,q}: it takes two small matrices
for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..wavelet import Constants, Subband, autocast_off, axis_sizes, constant_tensors
from .token_grid import TokenGrid


@cache
def grid_subbands(levels: int) -> tuple[Subband, ...]:
    """Subbands of a grid in the order of their blocks: aa{L}, then ad{j}, da{j}, dd{j} for j = 1 ... L."""
    details = [Subband(rows, columns, level) for level in range(1, levels + 1) for rows, columns in ("ad", "da", "dd")]
    return (Subband("a", "a", levels), *details)


class _Derived:
    """Declares an attribute of `TokenMixing` that must be no field. `wavelet.layout._Derived` gives the reason."""

    constants: Constants


@dataclass(frozen=True)
class TokenMixing(_Derived):
    """Applies P_s to the channels of each subband s, between A and B.

    Args:
        module_name: name of the layer, for errors.
        grid: all that is known about the layer's tokens.
        wavelet: name of an orthogonal wavelet.
        channels: the subband of each channel, in the order of `grid_subbands`.
    """

    module_name: str
    grid: TokenGrid
    wavelet: str
    channels: tuple[Subband, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "constants", Constants())

    def __call__(self, hidden: Tensor, gain: Tensor | None = None) -> Tensor:
        """Apply P_s to each channel.

        Args:
            hidden: A x, (batch, tokens, R).
            gain: (3L + 1, r), given if all subbands share R = r channels. It weighs each channel in each subband.

        Returns:
            (batch, tokens, R) in the dtype of `hidden`, computed in float32 or better. Prefix tokens keep the
            channels of the coarsest subband and lose the others.

        Raises:
            ValueError: `hidden` is not of three dimensions, or the tokens fit no grid.
        """
        prefix, rows, columns = self._split(hidden)
        with autocast_off([hidden]):
            wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            if gain is not None:
                wide = wide.repeat(1, 1, len(gain))
            # Channels of the coarsest subband come first. Prefix tokens have no place on the grid, and get only these.
            coarsest = sum(band.out_band == band.in_band == "a" for band in self.channels)
            before = F.pad(wide[:, :prefix, :coarsest], (0, wide.shape[2] - coarsest))
            mixed = torch.cat((before, self._mix(wide[:, prefix:], rows, columns)), 1)
            if gain is not None:
                mixed = (mixed.unflatten(2, gain.shape) * gain.to(mixed.dtype)).sum(2)
            return mixed.to(hidden.dtype)

    def _split(self, hidden: Tensor) -> tuple[int, int, int]:
        if hidden.ndim != 3:
            raise ValueError(
                f"form='grid' in module {self.module_name!r} needs inputs of shape (batch, tokens, features), not of "
                f"{hidden.ndim} dimensions. Leave the module out with `exclude_modules`; a head goes into "
                "`modules_to_save`."
            )
        tokens = hidden.shape[1]
        split = self.grid.split(tokens)
        if split is None:
            made = self.grid.contradicted_by(self.grid.prefix or 0, tokens) if self.grid.fixed else None
            if made is not None:
                raise ValueError(
                    f"grid_size={self.grid.size} is not what module {self.module_name!r} sees: the model's "
                    f"convolutions make {made} patches of its {tokens} tokens. Leave grid_size out, or set it to "
                    f"{made}."
                )
            raise ValueError(
                f"The {tokens} tokens in module {self.module_name!r} fit no grid: expected {self.grid}. Set "
                "`grid_size=(rows, columns)` and `num_prefix_tokens` in the config, or leave the module out with "
                "`exclude_modules`."
            )
        return split

    def _mix(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        batch, _, channels = patches.shape
        of_rows = tuple((band.level, band.out_band) for band in self.channels)
        of_columns = tuple((band.level, band.in_band) for band in self.channels)
        of_both = self.constants, patches, patches.dtype, self.wavelet
        (along_rows,) = _projections(*of_both, rows, of_rows)  # (R, H, H)
        (along_columns,) = _projections(*of_both, columns, of_columns)  # (R, W, W)
        signal = patches.permute(2, 0, 1).reshape(channels, batch * rows, columns)
        signal = torch.bmm(signal, along_columns.mT).view(channels, batch, rows, columns)
        signal = signal.transpose(2, 3).reshape(channels, batch * columns, rows)
        signal = torch.bmm(signal, along_rows.mT).view(channels, batch, columns, rows)
        return signal.permute(1, 3, 2, 0).reshape(batch, rows * columns, channels)


@constant_tensors
def _projections(
    device: torch.device, dtype: torch.dtype, wavelet: str, length: int, channels: tuple[tuple[int, str], ...]
) -> tuple[Tensor]:
    """P_{j,band} of an axis for each channel, (R, length, length). `channels` has the level and band of each."""
    different = tuple(dict.fromkeys(channels))
    table = torch.tensor(_projection_table(wavelet, length, different), dtype=dtype, device=device)
    places = torch.tensor([different.index(channel) for channel in channels], device=device)
    return (table.index_select(0, places),)


# torch.compile cannot trace PyWavelets. It calls this function while it compiles, and keeps the result.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _projection_table(wavelet: str, length: int, bands: tuple[tuple[int, str], ...]) -> list[Any]:
    """P_{j,band} for each level and band. PyWavelets computes them in float64, whatever mode torch is in."""
    table = []
    sizes = axis_sizes(length, max(level for level, _ in bands))
    for level, band in bands:
        signal = np.eye(length)
        for step in range(level):
            approximation, detail = pywt.dwt(signal, wavelet, mode="periodization", axis=0)
            signal = detail if band == "d" and step == level - 1 else approximation
        parts = (None, signal) if band == "d" else (signal, None)
        for finer in reversed(sizes[:level]):
            signal = pywt.idwt(*parts, wavelet, mode="periodization", axis=0)[:finer]
            parts = (signal, None)
        table.append(signal.tolist())
    return table
