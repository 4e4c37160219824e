"""Modules that hold the subband factors of one side of a weight and hand out its low-rank factor Â or B̂.

A subband s = (p q j) has the band p of the out axis and q of the in axis at level j. Its coefficients are
C_s = B_s A_s, with A_s of shape (r_s, n_j) and B_s of shape (m_j, r_s):

    ΔW / scaling = Σ_s (S^out_{j,p} B_s)(A_s S^in_{j,q}ᵀ) = B̂ Â,    Â: (R, n),  B̂: (m, R),  R = Σ_s r_s.

Rows of Â and columns of B̂ stand in the same order: coarsest level first, level 0 last, and within a level aa, ad, da,
dd. All rows of level j are one parameter, `level{j}`. A level without ranks has no parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_argument
from ..wavelet import Axis, Subband, adjoint, least_squares, subbands, synthesis, synthesis_at
from .factor_cache import Keeping

IN_DIM = 1
"""Dimension along which Â, of shape (R, n), is transformed."""
OUT_DIM = 0
"""Dimension along which B̂, of shape (m, R), is transformed."""


class SubbandFactor(nn.Module):
    """Coefficients of one side of all subbands. Calling it gives Â (`dim=1`) or B̂ (`dim=0`).

    The result is synthesised in every call, outside of the scopes of `factor_cache`.

    Args:
        wavelet: name of an orthogonal wavelet.
        levels: number of decomposition levels L.
        length: length of the axis: in_features for Â, out_features for B̂.
        ranks: rank of each subband by name; subbands of rank 0 may be left out.
        dim: 1 for Â, 0 for B̂.
        kernel: with `dim=1` the kernel size of a convolution, whose dimensions follow the channel axis untransformed.

    Shapes:
        Parameter `level{j}`: (R_j, d_j, *kernel) with `dim=1`, (d_j, R_j) with `dim=0`. Result: (R, length, *kernel)
        or (length, R), in the parameters' dtype.
    """

    def __init__(
        self,
        wavelet: str,
        levels: int,
        length: int,
        ranks: Mapping[str, int],
        dim: int,
        kernel: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.dim = dim
        self.kernel = kernel
        self.ranks = {band.name: ranks[band.name] for band in subbands(levels) if ranks.get(band.name, 0)}
        self.axis = Axis(wavelet, length, tuple(self._letters(level) for level in range(levels + 1)))
        self.keeping = Keeping()
        # `frozen_factors` checks no tensor, so loading has to say that values change.
        self.register_load_state_dict_pre_hook(_changed)
        self._create_parameters()

    def _letters(self, level: int) -> str:
        """The band of each row of a level on this factor's axis."""
        return "".join(
            (band.in_band if self.dim == IN_DIM else band.out_band) * self.ranks[band.name]
            for band in map(Subband.named, self.ranks)
            if band.level == level
        )

    def _create_parameters(self) -> None:
        for level, (bands, size) in enumerate(zip(self.axis.bands, self.axis.sizes, strict=True)):
            if bands:
                self.register_parameter(f"level{level}", self._empty(len(bands), size))

    def _empty(self, rank: int, size: int) -> nn.Parameter:
        shape = (rank, size, *self.kernel) if self.dim == IN_DIM else (size, rank)
        return nn.Parameter(torch.empty(shape))

    @property
    def rank(self) -> int:
        """Total rank R: rows of Â, columns of B̂."""
        return self.axis.rows

    @property
    def subbands(self) -> tuple[str, ...]:
        """Names of the subbands that have a rank, in the order of their rows."""
        return tuple(self.ranks)

    @property
    def rank_dim(self) -> int:
        """Dimension of the parameters along which the rank is counted: rows of A_s, columns of B_s."""
        return 1 - self.dim

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def subband(self, name: str) -> Tensor:
        """View of one subband's A_s, of shape (r_s, n_j), or B_s, of shape (m_j, r_s).

        Raises:
            KeyError: that subband has no rank here.
        """
        if name not in self.ranks:
            raise KeyError(f"No subband {name!r} with a rank; there are {', '.join(self.ranks)}.")
        level = Subband.named(name).level
        before = [other for other in self.ranks if Subband.named(other).level == level]
        start = sum(self.ranks[other] for other in before[: before.index(name)])
        return self._rows(level).narrow(self.rank_dim, start, self.ranks[name])

    def _rows(self, level: int) -> Tensor:
        """All rows of a level that has ranks."""
        rows: Tensor = getattr(self, f"level{level}")
        return rows

    def coefficients(self) -> list[Tensor | None]:
        """For each level its rows, or None if it has none, in the form in which `synthesis` takes them."""
        return [self._rows(level) if bands else None for level, bands in enumerate(self.axis.bands)]

    def synthesise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The factor, computed in `dtype`; None means the parameters' dtype."""
        coefficients = self.coefficients()
        if dtype is not None:
            coefficients = [None if rows is None else rows.to(dtype) for rows in coefficients]
        return self.synthesis_of(coefficients)

    def synthesis_of(self, coefficients: Sequence[Tensor | None]) -> Tensor:
        """The factor that these coefficients give."""
        return synthesis(coefficients, self.axis, self.dim)

    def adjoint(self, factor: Tensor) -> list[Tensor | None]:
        """The gradients of the coefficients for a gradient of the factor, as that is linear in them."""
        return adjoint(factor, self.axis, self.dim)

    def nearest(self, factor: Tensor) -> list[Tensor | None]:
        """The coefficients whose factor is nearest to this one, of the shape that `synthesise` gives."""
        return least_squares(factor, self.axis, self.dim)

    def sources(self) -> tuple[Tensor, ...]:
        """The tensors that the factor is made from; an empty tuple if a parametrization has replaced one."""
        return () if self._modules else tuple(self._parameters.values())  # type: ignore[arg-type]  # none is None

    def forward(self, positions: Tensor | None = None) -> Tensor:
        """Â, of shape (R, length, *kernel), or B̂, of shape (length, R).

        Args:
            positions: integers of shape (N,), with `dim=1`. The result has only these columns of Â, (R, N), and only
                the coefficients that they need are read. Embeddings use it, for their axis is a whole vocabulary.

        Raises:
            RuntimeError: inside `frozen_factors` while gradients are enabled.
        """
        if positions is not None:
            self.keeping.check_gradients()
            return synthesis_at(self.coefficients(), self.axis, positions)
        return self.keeping.get(self.sources, self.synthesise)

    def _apply(self, fn: Any, recurse: bool = True) -> SubbandFactor:
        super()._apply(fn, recurse)
        self.keeping.changed()
        self.axis.constants.clear()  # this factor may have left their device, and would hold them there for nothing
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle that is made inside a scope is no part of the scope, and gets no kept factor."""
        return {**self.__dict__, "keeping": Keeping()}

    def _replicate_for_data_parallel(self) -> SubbandFactor:
        """A replica on another device gets no kept factor either, for that lies on the first device.

        `nn.DataParallel` calls this private method for each module and forward.
        """
        replica: SubbandFactor = super()._replicate_for_data_parallel()
        replica.keeping = Keeping()
        return replica

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}={rank}" for name, rank in self.ranks.items())
        return f"length={self.axis.length}, wavelet={self.axis.wavelet!r}, R={self.rank}, {ranks}"


def _changed(factor: SubbandFactor, *_: Any) -> None:
    factor.keeping.changed()


class TiedFactor(nn.Module):
    """The factor of a layer whose weight is tied to another layer's: it hands out the other layer's factor.

    It has no parameters of its own, so both layers train, save and load the same numbers.

    Args:
        source: the other layer's factor: Â for Â and B̂ for B̂. If `transposed`, B̂ for Â and Â for B̂.
        transposed: whether this layer's weight is the transpose of the other's, as a linear layer's may be of an
            embedding's.
    """

    def __init__(self, source: SubbandFactor, transposed: bool) -> None:
        super().__init__()
        self._source = [source]  # in a list, so that it is not registered as a part of this module
        self.transposed = transposed

    @property
    def source(self) -> SubbandFactor:
        return self._source[0]

    @source.setter
    def source(self, source: SubbandFactor) -> None:
        self._source = [source]

    @property
    def rank(self) -> int:
        return self.source.rank

    @property
    def subbands(self) -> tuple[str, ...]:
        return tuple(self._in_source(name) for name in self.source.subbands)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def subband(self, name: str) -> Tensor:
        return self._turned(self.source.subband(self._in_source(name)))

    def synthesise(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._turned(self.source.synthesise(dtype))

    def forward(self, positions: Tensor | None = None) -> Tensor:
        return self._turned(self.source(positions))

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.transposed else tensor

    def _in_source(self, name: str) -> str:
        """The name that a subband has in the source: ad1 of a matrix is da1 of its transpose."""
        band = Subband.named(name)
        return Subband(band.in_band, band.out_band, band.level).name if self.transposed else name


@contextmanager
def frozen_factors(model: nn.Module) -> Iterator[None]:
    """Scope in which each WaRA factor of `model` is synthesised once, on first use, and then reused.

    It is meant for serving unmerged adapters. Outside of it a forward synthesises every factor, so that no change of a
    weight goes unseen. Inside, changes of the adapters' values go unseen, except those by `load_state_dict`.
    Switching, moving or casting adapters works. Forwards that ask for gradients are refused with a RuntimeError.

    Scopes nest, also those of several threads over one model, in any order. When the last one is left, also by an
    exception, no factor stays behind.

    Args:
        model: any module. The adapters that it has on entry take part.

    Example:
        >>> with torch.inference_mode(), wara_peft.frozen_factors(model):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    check_argument("frozen_factors(model)", "model", model, "an nn.Module")
    factors = [module for module in model.modules() if isinstance(module, SubbandFactor)]
    for factor in factors:
        factor.keeping.enter()
    try:
        yield
    finally:
        for factor in factors:
            factor.keeping.leave()
