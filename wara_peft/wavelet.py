"""Orthogonal wavelets with periodised boundaries: filters, subband layout and 1-D transforms of rows.

Axis length d, synthesis filters (lo, hi) from PyWavelets, d_0 = d and d_j = ceil(d_{j-1} / 2). Lo_j and Hi_j, both of
shape (d_{j-1}, d_j), upsample by two, filter circularly and trim to d_{j-1}. Then

    S_{j,a} = Lo_1 ... Lo_{j-1} Lo_j,        S_{j,d} = Lo_1 ... Lo_{j-1} Hi_j,        S_0 = I.

Every signal handled here lies in one band: a row of level j is multiplied by S_{j,a} or S_{j,d}, whichever its `Axis`
says. That is what low-rank factors of subbands need, and all rows of a level then share one pass. Nothing here knows
of modules or of PEFT.

Source of the boundary handling: PyWavelets, mode "periodization".
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pywt
import torch
from torch import Tensor

from . import equivalent
from .constants import is_transformed, made_once

BANDS = ("a", "d")


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


def axis_sizes(length: int, levels: int) -> tuple[int, ...]:
    """Sizes (d_0, d_1, ..., d_levels) of an axis, with d_0 = length and d_j = ceil(d_{j-1} / 2)."""
    sizes = [length]
    for _ in range(levels):
        sizes.append((sizes[-1] + 1) // 2)
    return tuple(sizes)


@dataclass(frozen=True)
class Subband:
    """One subband of a 2-D decomposition: band of the out axis, band of the in axis, level.

    Level 0 with bands "a", "a" is the undecomposed matrix.
    """

    out_band: str
    in_band: str
    level: int

    @property
    def name(self) -> str:
        """PyWavelets' n-D name (first letter the out axis), followed by the level, such as `ad1`."""
        return f"{self.out_band}{self.in_band}{self.level}"

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape (m_j, n_j) of the subband of an (out_features, in_features) matrix."""
        return axis_sizes(out_features, self.level)[-1], axis_sizes(in_features, self.level)[-1]


@cache
def subbands(levels: int) -> tuple[Subband, ...]:
    """All subbands of a decomposition: aa, ad, da, dd of the coarsest level, then ad, da, dd of each finer, then aa0.

    Raises:
        ValueError: levels is less than 1.
    """
    if levels < 1:
        raise ValueError(f"levels={levels!r} must be at least 1.")
    details = [Subband(out, in_, level) for level in range(levels, 0, -1) for out, in_ in ("ad", "da", "dd")]
    return (Subband("a", "a", levels), *details, Subband("a", "a", 0))


@dataclass(frozen=True)
class Axis:
    """Rows of a factor in the wavelet domain of one axis.

    Args:
        wavelet: name of an orthogonal wavelet.
        length: length d of the axis.
        bands: for each level j = 0 ... L a string with one letter a row, "a" or "d": the band in which that row lies.
            Rows of level 0 are not transformed; their letters only count them.
    """

    wavelet: str
    length: int
    bands: tuple[str, ...]

    @property
    def levels(self) -> int:
        return len(self.bands) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return axis_sizes(self.length, self.levels)

    @property
    def rows(self) -> int:
        return sum(map(len, self.bands))


def autocast_off(tensors: Sequence[Tensor | None]) -> AbstractContextManager[Any]:
    """Context in which operations keep the dtype of their tensors, on the device of the first of these.

    Autocast would change the dtype of some operations, and refuse a mixture for others.
    """
    device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("meta"))
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device) else nullcontext()


def is_autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for a device, of any type."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def synthesis(coefficients: Sequence[Tensor | None], axis: Axis, dim: int) -> Tensor:
    """Transform rows from the wavelet domain to the axis: row i of level j becomes S_{j, bands[j][i]} times itself.

    Linear, and differentiable any number of times; its gradient is `adjoint`, and it saves nothing for backward.

    Args:
        coefficients: for each level j = 0 ... L the rows of that level, or None where it has none: shape (R_j, d_j)
            with `dim=1`, (d_j, R_j) with `dim=0`. Any floating dtype, any device. With `dim=1` further dimensions may
            follow, such as those of a convolution's kernel, and stay as they are.
        axis: the layout of the rows.
        dim: the dimension that is transformed, 0 or 1.

    Returns:
        All rows, those of the coarsest level first and those of level 0 last: (R, d) with `dim=1`, (d, R) with
        `dim=0`, in the dtype of the coefficients.

    Raises:
        ValueError: a level's rows do not have the shape that the axis gives.
    """
    with autocast_off(coefficients):
        if is_transformed():
            return _synthesise(coefficients, axis, dim)
        _check_shapes(coefficients, axis, dim)
        return _Synthesis.apply(axis, dim, *coefficients)  # type: ignore[no-any-return]


def synthesis_at(coefficients: Sequence[Tensor | None], axis: Axis, positions: Tensor) -> Tensor:
    """Some columns of `synthesis(coefficients, axis, dim=1)`, from the coefficients that these columns need alone.

    Args:
        coefficients, axis: as in `synthesis`, with `dim=1`.
        positions: the columns, integers of shape (N,), each at least 0 and less than the length of the axis.

    Returns:
        (R, N) in the dtype of the coefficients.
    """
    _check_shapes(coefficients, axis, dim=1)
    with autocast_off(coefficients):
        parts = [_columns(coefficients, axis, 1, positions)] if axis.rows > len(axis.bands[0]) else []
        if coefficients[0] is not None:
            parts.append(coefficients[0].index_select(1, positions))
        return torch.cat(parts)


def adjoint(signal: Tensor, axis: Axis, dim: int) -> list[Tensor | None]:
    """Transpose of `synthesis`: row i of level j becomes S_{j, bands[j][i]}ᵀ times the matching row of the signal.

    Args:
        signal: (R, d) with `dim=1`, (d, R) with `dim=0`, rows in the order that `synthesis` returns.
        axis, dim: as in `synthesis`.

    Returns:
        For each level the rows of that level, or None where it has none, as `synthesis` takes them.
    """
    with autocast_off([signal]):
        if _in_one_step(signal, axis, dim):
            return equivalent.decompose(signal, axis, filters(axis.wavelet), dim)
        return _decompose(signal, axis, dim, repeat_last=False)


def into_band(rows: Tensor, wavelet: str, level: int, band: str) -> Tensor:
    """S_{level,band}ᵀ times each row: (R, d) becomes (R, d_level); level 0 leaves it as it is."""
    axis = Axis(wavelet, rows.shape[1], ("",) * level + (band * len(rows),))
    result = adjoint(rows, axis, dim=1)[level]
    assert result is not None
    return result


def analysis(signal: Tensor, axis: Axis, dim: int) -> list[Tensor | None]:
    """PyWavelets' forward transform of each row, of which the row's own band is kept.

    Arguments and result are those of `adjoint`. The two differ only on odd lengths, where PyWavelets repeats the last
    sample first; there the sum over all bands of `synthesis(analysis(x))` is still x.
    """
    with autocast_off([signal]):
        return _decompose(signal, axis, dim, repeat_last=True)


class _Synthesis(torch.autograd.Function):
    """`synthesis` as one node of the autograd graph, whose backward is `adjoint` and which saves no tensor.

    Its forward takes the context: with a separate `setup_context` a call takes 20 to 40 microseconds longer.
    """

    @staticmethod
    def forward(ctx: Any, axis: Axis, dim: int, *coefficients: Tensor | None) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        sample = next(rows for rows in coefficients if rows is not None)
        if _in_one_step(sample, axis, dim):
            result = equivalent.synthesise(coefficients, axis, filters(axis.wavelet), dim)
            # Level 0 alone is its own synthesis; autograd does not take an input for an output.
            return result.view_as(result) if axis.rows == len(axis.bands[0]) else result
        return _synthesise(coefficients, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *adjoint(grads[0], ctx.axis, ctx.dim))


def _in_one_step(rows: Tensor, axis: Axis, dim: int) -> bool:
    """Whether the transforms with equivalent filters serve: on CPUs, where they are faster."""
    plain = rows.device.type == "cpu" and rows.ndim == 2 and type(rows) in (Tensor, torch.nn.Parameter)
    # The gradient of B̂ is the transpose of a product, and lies by rows though its dimension is 0.
    return plain and not is_transformed() and equivalent.covers(axis, filters(axis.wavelet), rows.stride(dim) == 1)


def _synthesise(coefficients: Sequence[Tensor | None], axis: Axis, dim: int) -> Tensor:
    sizes = axis.sizes
    rows: Tensor | None = None
    bands = ""
    for level in range(axis.levels, 0, -1):
        rows = _join(rows, coefficients[level], dim)
        bands = "a" * len(bands) + axis.bands[level]
        if rows is not None:
            rows = _upsample(rows, axis.wavelet, bands, sizes[level - 1], dim)
    result = _join(rows, coefficients[0], dim)
    assert result is not None
    # Level 0 alone is its own synthesis; autograd does not take an input for an output.
    return result.view_as(result) if rows is None else result


def _columns(coefficients: Sequence[Tensor | None], axis: Axis, level: int, positions: Tensor) -> Tensor:
    """What rows of `level` and coarser are at some positions of the next finer level: by polyphase, as `_upsample`."""
    size = axis.sizes[level]
    coarser = "a" * sum(map(len, axis.bands[level + 1 :]))
    sample = next(rows for rows in coefficients[level:] if rows is not None)
    first, taps = _taps(sample, axis.wavelet, coarser + axis.bands[level], 1, size)
    shifts = torch.arange(first, first + len(taps), device=positions.device)
    needed = (positions // 2 - shifts[:, None]).remainder(size)  # (shifts, N)
    parts = []
    if coarser:
        parts.append(_columns(coefficients, axis, level + 1, needed.flatten()))
    rows = coefficients[level]
    if rows is not None:
        parts.append(rows.index_select(1, needed.flatten()))
    values = torch.cat(parts).view(-1, *needed.shape)  # (R, shifts, N)
    by_phase = taps.squeeze(2).transpose(0, 1).index_select(2, positions % 2)  # (R, shifts, N)
    return (values * by_phase).sum(1)


def _decompose(signal: Tensor, axis: Axis, dim: int, repeat_last: bool) -> list[Tensor | None]:
    row_dim = 1 - dim
    counts = [len(bands) for bands in axis.bands]
    result: list[Tensor | None] = [None] * len(counts)
    remaining = axis.rows - counts[0]
    if counts[0]:
        result[0] = signal.narrow(row_dim, remaining, counts[0])
    rows = signal.narrow(row_dim, 0, remaining)
    for level in range(1, axis.levels + 1):
        if remaining == 0:
            break
        coarser = remaining - counts[level]
        rows = _downsample(rows, axis.wavelet, "a" * coarser + axis.bands[level], dim, repeat_last)
        if counts[level]:
            result[level] = rows.narrow(row_dim, coarser, counts[level])
        rows = rows.narrow(row_dim, 0, coarser)
        remaining = coarser
    return result


def _upsample(rows: Tensor, wavelet: str, bands: str, length: int, dim: int) -> Tensor:
    """One level of synthesis by polyphase: sample 2i + p is the sum over shifts s of taps[s, p] times sample i - s."""
    size = rows.shape[dim]
    first, taps = _taps(rows, wavelet, bands, dim)
    last = first + len(taps) - 1
    padded = _pad_circularly(rows, last, -first, dim).unsqueeze(dim + 1)
    result = padded.narrow(dim, last - first, size) * taps[0]
    for index in range(1, len(taps)):
        result = torch.addcmul(result, padded.narrow(dim, last - first - index, size), taps[index])
    result = result.flatten(dim, dim + 1)
    return result if length == 2 * size else result.narrow(dim, 0, length)


def _downsample(rows: Tensor, wavelet: str, bands: str, dim: int, repeat_last: bool) -> Tensor:
    """Transpose of `_upsample`; an odd length is first filled up with a zero, or with a copy of its last sample."""
    length = rows.shape[dim]
    if length % 2:
        final = rows.narrow(dim, length - 1, 1)
        rows = torch.cat((rows, final if repeat_last else torch.zeros_like(final)), dim)
    size = rows.shape[dim] // 2
    first, taps = _taps(rows, wavelet, bands, dim, size)
    last = first + len(taps) - 1
    padded = _pad_circularly(rows.unflatten(dim, (size, 2)), -first, last, dim)
    result = (padded.narrow(dim, 0, size) * taps[0]).sum(dim + 1)
    for index in range(1, len(taps)):
        result = result + (padded.narrow(dim, index, size) * taps[index]).sum(dim + 1)
    return result


def _join(coarser: Tensor | None, finer: Tensor | None, dim: int) -> Tensor | None:
    if coarser is None or finer is None:
        return finer if coarser is None else coarser
    return torch.cat((coarser, finer), 1 - dim)


def _pad_circularly(rows: Tensor, before: int, after: int, dim: int) -> Tensor:
    if before == after == 0:
        return rows
    size = rows.shape[dim]
    return torch.cat((rows.narrow(dim, size - before, before), rows, rows.narrow(dim, 0, after)), dim)


def _taps(rows: Tensor, wavelet: str, bands: str, dim: int, size: int | None = None) -> tuple[int, Tensor]:
    """First shift, and filter taps by shift and phase for each row, shaped to multiply rows with a phase dimension."""
    first, count = _shifts(wavelet, rows.shape[dim] if size is None else size)
    # Taps cost more to make than to use. A traced graph holds them as constants, and must not leave them here.
    build = _build_taps if torch.compiler.is_compiling() else _kept_taps
    taps = build(wavelet, bands, first, count, dim, rows.dtype, rows.device)
    return first, taps.reshape(*taps.shape, *[1] * (rows.ndim - 2))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shifts(wavelet: str, size: int) -> tuple[int, int]:
    """First shift and number of shifts of the polyphase filter on an axis of `size` coefficients.

    With filter length F and offset c = F/2 - 1, phase p at shift s takes the tap 2s + p + c. A filter that is longer
    than the axis is wrapped around it, which leaves one shift for each coefficient.
    """
    half = len(filters(wavelet).lo) // 2
    first, last = -(half // 2), half // 2
    count = last - first + 1
    return (0, size) if count > size else (first, count)


def _build_taps(
    wavelet: str, bands: str, first: int, count: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Taps of shape (shifts, 1, 2, rows) with `dim=0`, (shifts, rows, 1, 2) with `dim=1`."""
    return torch.tensor(_tap_table(wavelet, bands, first, count, dim), dtype=dtype, device=device)


_kept_taps = made_once(_build_taps)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tap_table(wavelet: str, bands: str, first: int, count: int, dim: int) -> list[Any]:
    found = filters(wavelet)
    offset = len(found.lo) // 2 - 1
    taps = {band: [[0.0, 0.0] for _ in range(count)] for band in BANDS}
    for band, values in zip(BANDS, (found.lo, found.hi), strict=True):
        for index, value in enumerate(values):
            shift, phase = divmod(index - offset, 2)
            taps[band][(shift - first) % count][phase] += value
    if dim == 1:
        return [[[taps[band][shift]] for band in bands] for shift in range(count)]
    return [[[[taps[band][shift][phase] for band in bands] for phase in (0, 1)]] for shift in range(count)]


def _check_shapes(coefficients: Sequence[Tensor | None], axis: Axis, dim: int) -> None:
    if len(coefficients) != len(axis.bands):
        raise ValueError(f"Expected rows or None for the levels 0 to {axis.levels}, got {len(coefficients)} entries.")
    for level, (rows, bands, size) in enumerate(zip(coefficients, axis.bands, axis.sizes, strict=True)):
        expected = (len(bands), size) if dim == 1 else (size, len(bands))
        found = (0, size) if rows is None else tuple(rows.shape[:2])
        if rows is None and not bands:
            continue
        if found != expected:
            raise ValueError(f"Rows of level {level} must have shape {expected} with dim={dim}, got {found}.")
