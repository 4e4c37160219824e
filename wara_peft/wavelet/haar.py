"""One level of Haar: each coefficient becomes two neighbours, of which the second has the sign of the band.

    (S c)[2i] = c[i] / √2,      (S c)[2i + 1] = ± c[i] / √2,      + in band a, - in band d.

Synthesis is one product with a broadcast pair of numbers for each row. The adjoint takes one operation more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .constant_tensors import constant_tensors
from .filters import taps_of_rows
from .layout import Axis


def serves(rows: Tensor, axis: Axis) -> bool:
    """Whether the axis has one level of Haar, and the rows a dtype in which a sum of two numbers is precise enough."""
    one_level = not any(axis.bands[2:])
    return one_level and axis.wavelet in ("haar", "db1") and rows.dtype in (torch.float32, torch.float64)


def synthesise(rows: Tensor, axis: Axis, dim: int) -> Tensor:
    """`synthesis` of the rows of level 1.

    Args:
        rows: (R, d_1) with `dim=1`, (d_1, R) with `dim=0`.
        axis, dim: as in `synthesis`.
    """
    (pair,) = _pairs(axis.constants, rows, rows.dtype, axis.wavelet, axis.bands[1], dim)
    result = (rows.unsqueeze(dim + 1) * pair.unsqueeze(dim)).flatten(dim, dim + 1)
    return result.narrow(dim, 0, axis.length)


def decompose(signal: Tensor, axis: Axis, dim: int) -> list[Tensor | None]:
    """Transpose of `synthesise`. For each level it returns the rows, or None if the level has none."""
    (pair,) = _pairs(axis.constants, signal, signal.dtype, axis.wavelet, axis.bands[1], dim)
    if axis.length % 2:  # synthesis trimmed one sample, and the transpose of trimming appends a zero
        signal = F.pad(signal, (0, 1) if dim == 1 else (0, 0, 0, 1))
    first, second = signal.unflatten(dim, (axis.sizes[1], 2)).unbind(dim + 1)
    of_first, of_second = pair.unsqueeze(dim).unbind(dim + 1)
    result: list[Tensor | None] = [None] * len(axis.bands)
    result[1] = torch.addcmul(first * of_first, second, of_second)
    return result


@constant_tensors
def _pairs(device: torch.device, dtype: torch.dtype, wavelet: str, bands: str, dim: int) -> tuple[Tensor]:
    """The filter of each row's band: (R, 2) with `dim=1`, (2, R) with `dim=0`."""
    rows = taps_of_rows(device, dtype, wavelet, bands, 1).squeeze(1)
    return (rows if dim == 1 else rows.T.contiguous(),)
