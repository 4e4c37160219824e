"""The layout of axes and subbands: their sizes and names, and the band of each row."""

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
        """The subband with this name, such as `ad1`. The name is not checked."""
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
    """Declares the attributes of `Axis` that are computed from its fields.

    They must be no fields: Dynamo of PyTorch 2.9 passes every field to `Axis`.
    """

    sizes: tuple[int, ...]
    rows: int
    transformed_rows: int
    last_level_at_once: int
    runs: tuple[tuple[tuple[str, int], ...], ...]
    block_width: int
    constants: Constants


# Letters of the blocks of a level whose subbands all have the same rank: one for each subband, or one for each run of
# subbands in one band.
_EQUAL_RANKS = {"a", "d", "ad"}
_COARSEST, _FINER = {*_EQUAL_RANKS, "adad", "aadd"}, {*_EQUAL_RANKS, "dad", "add"}


@dataclass(frozen=True)
class Axis(_Derived):
    """The layout of a factor's rows in the wavelet domain of one axis.

    Args:
        wavelet: name of an orthogonal wavelet.
        length: length d of the axis.
        bands: for each level j = 0 ... L a string with one letter, "a" or "d", for each row: the band in which the row
            lies. Rows of level 0 are not transformed; their letters only count them.

    Attributes:
        sizes: the sizes (d_0, ..., d_L) of the levels.
        rows: number of rows of all levels.
        transformed_rows: number of rows of level 1 and coarser.
        last_level_at_once: the last level that one equivalent filter can reach, or 0 if it reaches all. A level of odd
            length is trimmed, and levels beyond it have no equivalent filter; so the axis is split there.
        runs: for each level its runs of neighbouring rows in one band: the band and the number of rows.
        block_width: number of rows of a block, if equal ranks of the subbands gave the layout: it then consists of few
            blocks, each in one band. 0 for any other layout.
        constants: the constant tensors that transforms of this axis use.
    """

    wavelet: str
    length: int
    bands: tuple[str, ...]

    def __post_init__(self) -> None:
        # These are computed once, for every forward of every factor reads them. The dataclass is frozen, so
        # only `object.__setattr__` can write them.
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
        """Split the axis into a finer one, of the levels 0 ... `level`, and a coarser one, of `level` ... L.

        Level 0 of the coarser axis is `level` of this axis. The rows that its synthesis returns are the rows of the
        finer axis at `level`: first the coarser ones, which now lie in band a, then those of `level` itself. Both axes
        share the constants of this one.
        """
        coarser = Axis(self.wavelet, self.sizes[level], self.bands[level:])
        joined = "a" * coarser.transformed_rows + self.bands[level]
        finer = Axis(self.wavelet, self.length, (*self.bands[:level], joined))
        return finer._with_constants_of(self), coarser._with_constants_of(self)

    def repeated(self, times: int) -> Axis:
        """The axis with `times` rows for each of its rows. It shares the constants of this axis."""
        bands = tuple("".join(band * times for band in bands) for bands in self.bands)
        return Axis(self.wavelet, self.length, bands)._with_constants_of(self)

    def _with_constants_of(self, other: Axis) -> Axis:
        object.__setattr__(self, "constants", other.constants)
        return self
