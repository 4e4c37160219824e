"""The layout of axes and subbands: sizes, names, and which row lies in which band."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from .constant_tensors import Constants

BANDS = ("a", "d")


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

    @classmethod
    @cache
    def named(cls, name: str) -> Subband:
        """The subband of that name, which is not checked."""
        return cls(name[0], name[1], int(name[2:]))

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


class _Derived:
    """Declares what follows from an axis's fields, and is no field: Dynamo of PyTorch 2.9 passes fields to `Axis`."""

    sizes: tuple[int, ...]
    rows: int
    transformed_rows: int
    last_level_at_once: int
    runs: tuple[tuple[tuple[str, int], ...], ...]
    block_width: int
    constants: Constants


# If all subbands of a level have the same rank, its letters, one for each subband or band, are among these.
_EQUAL_RANKS = {"a", "d", "ad"}
_COARSEST, _FINER = {*_EQUAL_RANKS, "adad", "aadd"}, {*_EQUAL_RANKS, "dad", "add"}


@dataclass(frozen=True)
class Axis(_Derived):
    """Rows of a factor in the wavelet domain of one axis.

    Args:
        wavelet: name of an orthogonal wavelet.
        length: length d of the axis.
        bands: for each level j = 0 ... L a string with one letter a row, "a" or "d": the band in which that row lies.
            Rows of level 0 are not transformed; their letters only count them.

    Attributes:
        sizes: the sizes (d_0, ..., d_L) of its levels.
        rows: number of rows of all levels.
        transformed_rows: rows of level 1 and coarser.
        last_level_at_once: the level at which the axis is to be split so that none but its first level trims, or 0
            where none does: a level of odd length is trimmed, after which coarser ones have no equivalent filter.
        runs: for each level its bands, each with the number of rows that lie in it side by side.
        block_width: number of rows of a block where all levels are laid out as ranks that are equal lay them out, in
            few blocks of one band each; 0 elsewhere.
        constants: the constant tensors that transforms of this axis use.
    """

    wavelet: str
    length: int
    bands: tuple[str, ...]

    def __post_init__(self) -> None:
        # Computed once: every forward of every factor reads them.
        sizes = axis_sizes(self.length, self.levels)
        transformed = sum(map(len, self.bands[1:]))
        odd = (level for level in range(1, len(sizes)) if sizes[level] % 2 and any(self.bands[level + 1 :]))
        runs = tuple(tuple((band, len(list(rows))) for band, rows in groupby(letters)) for letters in self.bands)
        width = math.gcd(*(rows for level in runs[1:] for _, rows in level))
        coarsest, *finer = [letters[::width] for letters in self.bands[:0:-1] if letters] or [""]
        equal = coarsest in _COARSEST and _FINER.issuperset(finer)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "rows", len(self.bands[0]) + transformed)
        object.__setattr__(self, "transformed_rows", transformed)
        object.__setattr__(self, "last_level_at_once", next(odd, 0))
        object.__setattr__(self, "runs", runs)
        object.__setattr__(self, "block_width", width if equal else 0)
        object.__setattr__(self, "constants", Constants())

    @property
    def levels(self) -> int:
        return len(self.bands) - 1

    def split(self, level: int) -> tuple[Axis, Axis]:
        """The axis as two, one after the other: levels 0 ... `level`, and those beyond it. They share its constants.

        What comes out of the coarser one, whose level 0 is this `level`, is what the finer one has at that level: the
        coarser rows, now in band a, and then its own.
        """
        coarser = Axis(self.wavelet, self.sizes[level], self.bands[level:])
        joined = "a" * coarser.transformed_rows + self.bands[level]
        finer = Axis(self.wavelet, self.length, (*self.bands[:level], joined))
        return finer._with_constants_of(self), coarser._with_constants_of(self)

    def repeated(self, times: int) -> Axis:
        """The axis with so many rows for each one. It shares the constants."""
        bands = tuple("".join(band * times for band in bands) for bands in self.bands)
        return Axis(self.wavelet, self.length, bands)._with_constants_of(self)

    def _with_constants_of(self, other: Axis) -> Axis:
        object.__setattr__(self, "constants", other.constants)
        return self
