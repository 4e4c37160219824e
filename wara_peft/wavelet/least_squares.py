"""Rows of the wavelet domain whose synthesis is nearest to given rows: the inverse of synthesis on its range."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Axis
from .transforms import Coefficients, adjoint, synthesis


@torch.no_grad()
def least_squares(signal: Tensor, axis: Axis, dim: int) -> list[Tensor | None]:
    """The coefficients c with the smallest ‖signal - S c‖.

    Where no level trims, SᵀS = I to the precision of PyWavelets' filters, and c = Sᵀ signal. Each level that trims a
    sample changes SᵀS by a matrix of rank one in each band. So conjugate gradients on SᵀS c = Sᵀ signal end after few
    steps.

    Args:
        signal: (R, d) with `dim=1`, (d, R) with `dim=0`, rows in the order that `synthesis` returns. With `dim=1`
            further dimensions may follow.
        axis, dim: as in `synthesis`.

    Returns:
        For each level its rows, or None if it has none, in the form in which `synthesis` takes them.
    """
    found = adjoint(signal, axis, dim)
    rest = adjoint(signal - synthesis(found, axis, dim), axis, dim)
    direction = rest
    trimming = sum(size % 2 for size in axis.sizes[:-1])
    # Twice as many as in exact arithmetic, as rounding costs some progress; dmey, orthogonal to 3e-3, needs four.
    for _ in range(2 * trimming + 4):
        through = adjoint(synthesis(direction, axis, dim), axis, dim)
        steps = _quotients(_products(rest, rest, dim), _products(direction, through, dim))
        found = _added(found, direction, steps)
        smaller = _added(rest, through, [None if step is None else -step for step in steps])
        turns = _quotients(_products(smaller, smaller, dim), _products(rest, rest, dim))
        rest, direction = smaller, _added(smaller, direction, turns)
    return found


def _products(one: Coefficients, other: Coefficients, dim: int) -> list[Tensor | None]:
    """Inner product of each row with its like, with size 1 in all other dimensions."""
    pairs = zip(one, other, strict=True)
    return [
        None if a is None or b is None else (a * b).sum([d for d in range(a.ndim) if d != 1 - dim], keepdim=True)
        for a, b in pairs
    ]


def _quotients(numerators: Coefficients, denominators: Coefficients) -> list[Tensor | None]:
    """Quotient of two numbers for each row, or 0 where the row needs no more steps."""
    return [
        None if n is None or d is None else torch.where(d > 0, n / d.clamp_min(torch.finfo(d.dtype).tiny), 0)
        for n, d in zip(numerators, denominators, strict=True)
    ]


def _added(one: Coefficients, other: Coefficients, factors: Coefficients) -> list[Tensor | None]:
    """Rows of the one, plus a factor for each row times the other."""
    return [
        None if a is None or b is None or f is None else a + f * b for a, b, f in zip(one, other, factors, strict=True)
    ]
