"""Synthesis of rows, and its adjoint, which is the gradient of synthesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import blocks, elementwise, haar, one_step
from .layout import Axis
from .modes import autocast_off, is_transformed

Coefficients = Sequence[Tensor | None]


def synthesis(coefficients: Coefficients, axis: Axis, dim: int) -> Tensor:
    """Transform rows from the wavelet domain to the axis: row i of level j becomes S_{j, bands[j][i]} times itself.

    It is linear, and differentiable any number of times. Its gradient is `adjoint`. No tensor is saved for backward.

    Args:
        coefficients: for each level j = 0 ... L the rows of that level, or None if it has none: shape (R_j, d_j)
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
    _check_shapes(coefficients, axis, dim)
    if not axis.transformed_rows:
        rows = coefficients[0]
        assert rows is not None
        return rows
    with autocast_off(coefficients):
        if _needs_node(coefficients):
            return _Transform.apply(False, axis, dim, *coefficients)  # type: ignore[no-any-return]
        return _synthesise(coefficients, axis, dim)


def synthesis_at(coefficients: Coefficients, axis: Axis, positions: Tensor) -> Tensor:
    """Some columns of `synthesis(coefficients, axis, dim=1)`. Only the coefficients that they need are read.

    Args:
        coefficients, axis: as in `synthesis`, with `dim=1`.
        positions: the columns, integers of shape (N,), each at least 0 and less than the length of the axis.

    Returns:
        (R, N) in the dtype of the coefficients.

    Raises:
        ValueError: a level's rows do not have the shape that the axis gives.
    """
    _check_shapes(coefficients, axis, dim=1)
    with autocast_off(coefficients):
        return elementwise.samples(coefficients, axis, positions)


def adjoint(signal: Tensor, axis: Axis, dim: int) -> list[Tensor | None]:
    """Transpose of `synthesis`: row i of level j becomes S_{j, bands[j][i]}ᵀ times the matching row of the signal.

    Args:
        signal: (R, d) with `dim=1`, (d, R) with `dim=0`, rows in the order that `synthesis` returns. With `dim=1`
            further dimensions may follow.
        axis, dim: as in `synthesis`.

    Returns:
        For each level its rows, or None if it has none, in the form in which `synthesis` takes them.
    """
    with autocast_off([signal]):
        if _needs_node([signal]):
            return list(_Transform.apply(True, axis, dim, signal))
        return _decompose(signal, axis, dim)


def into_band(rows: Tensor, wavelet: str, level: int, band: str) -> Tensor:
    """S_{level,band}ᵀ times each row: (R, d) becomes (R, d_level). Level 0 leaves the rows as they are."""
    axis = Axis(wavelet, rows.shape[1], ("",) * level + (band * len(rows),))
    result = adjoint(rows, axis, dim=1)[level]
    assert result is not None
    return result


def _needs_node(tensors: Coefficients) -> bool:
    """Whether a node of the autograd graph is needed: gradients are recorded, and no tracer or torch.func is at work.

    A node would hide its operations from a tracer and from torch.func.
    """
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return recorded and not is_transformed()


class _Transform(torch.autograd.Function):
    """`synthesis`, or `adjoint` if `transposed`, as a node of the autograd graph that saves no tensor.

    The backward of either is the other one. `forward` takes the context itself: with a separate `setup_context` a call
    takes 20 to 40 microseconds longer.
    """

    @staticmethod
    def forward(ctx: Any, transposed: bool, axis: Axis, dim: int, *tensors: Any) -> Any:
        ctx.transposed, ctx.axis, ctx.dim = transposed, axis, dim
        if transposed:
            return tuple(_decompose(tensors[0], axis, dim))
        return _synthesise(tensors, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.transposed:
            return None, None, None, synthesis(grads, ctx.axis, ctx.dim)
        return None, None, None, *adjoint(grads[0], ctx.axis, ctx.dim)


def _synthesise(coefficients: Coefficients, axis: Axis, dim: int) -> Tensor:
    sample = next(rows for rows in coefficients if rows is not None)
    if sample.ndim > 2:  # the transforms take matrices, so the elements of a kernel become rows
        kernel = sample.shape[2:]
        flat = [None if rows is None else _fold_kernel(rows) for rows in coefficients]
        return _unfold_kernel(_synthesise(flat, axis.repeated(kernel.numel()), dim), kernel)
    if not axis.transformed_rows:
        return sample
    level = axis.last_level_at_once
    if level:  # coarser levels have no equivalent filter down to the axis: transform them to `level` first
        axis, coarser = axis.split(level)
        coefficients = [*coefficients[:level], _synthesise(coefficients[level:], coarser, dim)]
    untransformed, *transformed = coefficients
    if haar.serves(sample, axis):
        assert transformed[0] is not None
        result = haar.synthesise(transformed[0], axis, dim)
    elif one_step.serves(sample, axis):
        result = one_step.synthesise([None, *transformed], axis, dim)
    elif dim == 1:
        result = blocks.synthesise([None, *transformed], axis)
    else:
        result = blocks.synthesise([None, *(None if rows is None else rows.T for rows in transformed)], axis).T
    return result if untransformed is None else torch.cat((result, untransformed), 1 - dim)


def _decompose(signal: Tensor, axis: Axis, dim: int) -> list[Tensor | None]:
    if signal.ndim > 2:
        kernel = signal.shape[2:]
        parts = _decompose(_fold_kernel(signal), axis.repeated(kernel.numel()), dim)
        return [None if rows is None else _unfold_kernel(rows, kernel) for rows in parts]
    transformed = signal.narrow(1 - dim, 0, axis.transformed_rows)
    level = axis.last_level_at_once
    finer, coarser = axis.split(level) if level else (axis, None)
    result: list[Tensor | None]
    if not axis.transformed_rows:
        result = [None] * len(axis.bands)
    elif haar.serves(signal, finer):
        result = haar.decompose(transformed, finer, dim)
    elif one_step.serves(signal, finer):
        result = one_step.decompose(transformed, finer, dim)
    elif dim == 1:
        result = blocks.decompose(transformed, finer)
    else:
        result = [None if rows is None else rows.T for rows in blocks.decompose(transformed.T, finer)]
    if coarser is not None:
        joined = result[level]
        assert joined is not None
        result = [*result[:level], *_decompose(joined, coarser, dim)]
    if axis.bands[0]:
        result[0] = signal.narrow(1 - dim, axis.transformed_rows, len(axis.bands[0]))
    return result


def _fold_kernel(rows: Tensor) -> Tensor:
    """(R, d, *kernel) to (R · kernel, d): every element of the kernel is a row of its own."""
    return rows.flatten(2).transpose(1, 2).flatten(0, 1)


def _unfold_kernel(rows: Tensor, kernel: torch.Size) -> Tensor:
    """Inverse of `_fold_kernel`."""
    return rows.view(-1, kernel.numel(), rows.shape[1]).transpose(1, 2).reshape(-1, rows.shape[1], *kernel)


def _check_shapes(coefficients: Coefficients, axis: Axis, dim: int) -> None:
    if len(coefficients) != len(axis.bands):
        raise ValueError(f"Expected rows or None for the levels 0 to {axis.levels}, got {len(coefficients)} entries.")
    for level, (rows, bands, size) in enumerate(zip(coefficients, axis.bands, axis.sizes, strict=True)):
        expected = (len(bands), size) if dim == 1 else (size, len(bands))
        found = (0, size) if rows is None else tuple(rows.shape[:2])
        if rows is None and not bands:
            continue
        if found != expected:
            raise ValueError(f"Rows of level {level} must have shape {expected} with dim={dim}, got {found}.")
