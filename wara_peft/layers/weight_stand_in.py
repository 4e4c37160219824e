"""`AdaptedWeight` stands in for a weight in products, and applies its low-rank updates without adding them to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wavelet import autocast_off

RANK_STEP = 8
"""Ranks are filled up to a multiple of this. Grouped products take only rows of a multiple of 16 bytes."""


@dataclass(frozen=True)
class Update:
    """The product left · right, which is added to a weight of shape (..., p, q).

    Attributes:
        left: (..., p, R).
        right: (..., R, q), with the scaling inside.
        dropout: dropout of the input before the update multiplies it. The weight multiplies the input without it.
    """

    left: Tensor
    right: Tensor
    dropout: nn.Module

    def padded(self) -> Update:
        """Return this update, filled up with zeros to a rank that grouped products take."""
        missing = -self.left.shape[-1] % RANK_STEP
        if not missing:
            return self
        return replace(self, left=F.pad(self.left, (0, missing)), right=F.pad(self.right, (0, 0, 0, missing)))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Update:
        """Apply a function, such as a cast, to both sides."""
        return replace(self, left=change(self.left), right=change(self.right))

    def transposed(self) -> Update:
        """Return the update of the transposed weight."""
        return replace(self, left=self.right.mT, right=self.left.mT)


class AdaptedWeight:
    """Stands for W + Σ left · right wherever it is multiplied: x W becomes x W + (x left) right.

    It is no tensor. Some functions work on it: `torch.nn.functional.linear`, `matmul`, `bmm`, and grouped products,
    those of transformers included. They compute the product with W and two thin products for each update. Transposing
    it, or indexing its first dimension by one or several experts, gives another `AdaptedWeight`. Any other use would
    need the sum, and is refused.

    Args:
        weight: a function that returns W, (p, q) or (experts, p, q). It is called when W is used.
        updates: the updates of W.
        name: the parameter's name in the model, for errors.
    """

    def __init__(self, weight: Callable[[], Tensor], updates: tuple[Update, ...], name: str) -> None:
        self._weight, self.updates, self.name = weight, updates, name
        self._apart: list[tuple[Update, ...]] | None = None  # the updates of each expert

    @property
    def weight(self) -> Tensor:
        return self._weight()

    def _like(self, change: Callable[[Tensor], Tensor], updates: tuple[Update, ...]) -> AdaptedWeight:
        return AdaptedWeight(lambda: change(self.weight), updates, self.name)

    def __getitem__(self, index: Any) -> AdaptedWeight:
        """Return the weight of one expert, or of several that a slice or a tensor of numbers names."""
        if self.ndim < 3 or not isinstance(index, (int, slice, Tensor)) or getattr(index, "ndim", 0) > 1:
            raise self._refusal(f"an index of type {type(index).__name__}")
        if isinstance(index, slice) or getattr(index, "ndim", 0) == 1:
            return self._like(
                lambda weight: weight[index], tuple(up.changed(lambda t: t[index]) for up in self.updates)
            )
        if self._apart is None:
            # All experts are taken apart at once: backward of `left[expert]` would fill a tensor as large as `left`,
            # for every expert, and that of `unbind` fills one for all.
            sides = [(up, up.left.unbind(), up.right.unbind()) for up in self.updates]
            self._apart = [
                tuple(replace(up, left=left[expert], right=right[expert]) for up, left, right in sides)
                for expert in range(len(self))
            ]
        return self._like(lambda weight: weight[index], self._apart[int(index)])

    def __iter__(self) -> Iterator[AdaptedWeight]:
        return (self[expert] for expert in range(len(self)))

    def chunk(self, parts: int) -> list[AdaptedWeight]:
        """Split the rows of a matrix into that many equal parts."""
        size = len(self) // parts
        rows = [slice(start, start + size) for start in range(0, len(self), size)]
        return [
            AdaptedWeight(
                # `partial` binds this part's rows; a plain lambda would see those of the last.
                partial(lambda self, own: self.weight[own], self, own),
                tuple(replace(update, left=update.left[own]) for update in self.updates),
                self.name,
            )
            for own in rows
        ]

    def __len__(self) -> int:
        return len(self.weight)

    def transpose(self, dim0: int, dim1: int) -> AdaptedWeight:
        """Return the weight with its last two dimensions exchanged."""
        if {dim0 % self.ndim, dim1 % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise self._refusal(f"transpose({dim0}, {dim1})")
        return self._like(lambda weight: weight.mT, tuple(update.transposed() for update in self.updates))

    @property
    def mT(self) -> AdaptedWeight:  # named as in torch.Tensor
        return self.transpose(-2, -1)

    @property
    def T(self) -> AdaptedWeight:
        return self.transpose(0, 1)

    def to(self, *args: Any, **kwargs: Any) -> AdaptedWeight:
        """Return the weight in another dtype, or on another device."""
        change = lambda tensor: tensor.to(*args, **kwargs)  # noqa: E731
        return self._like(change, tuple(update.changed(change) for update in self.updates))

    def type(self, dtype: torch.dtype) -> AdaptedWeight:
        return self.to(dtype)

    def float(self) -> AdaptedWeight:
        return self.to(torch.float32)

    def __getattr__(self, name: str) -> Any:
        """Answer for W about its dtype, device, shape and address; refuse other attributes."""
        if name in ("dtype", "device", "shape", "ndim", "size", "dim", "data_ptr", "is_cuda", "is_meta"):
            return getattr(self.weight, name)
        if name.startswith("__"):  # Python and libraries try such names, and expect this error
            raise AttributeError(name)
        raise self._refusal(f"its attribute {name!r}")

    def __matmul__(self, other: Tensor) -> Tensor:
        return _matmul(torch.matmul, self, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return _matmul(torch.matmul, other, self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute a product of which this weight is one factor; refuse all other functions of PyTorch."""
        name = getattr(func, "__name__", str(func)).removesuffix(".default").rpartition(".")[2]
        if name == "multi_head_attention_forward":
            return _attention(func, *args, **(kwargs or {}))
        found = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, AdaptedWeight)]
        product = _PRODUCTS.get(name)
        if product is None or len(found) != 1 or not any(found[0] is value for value in args[:2]):
            raise found[0]._refusal(f"torch's {name!r}")
        return product(func, *args, **(kwargs or {}))

    def _refusal(self, use: str) -> NotImplementedError:
        return NotImplementedError(
            f"The forward around {self.name!r} uses {use}, and the adapter of this parameter lies beside it for "
            "products alone. Choose another implementation (`model.set_experts_implementation('grouped_mm')`), merge "
            "the adapter first, or leave the parameter out of `target_parameters`."
        )


def _linear(func: Any, x: Tensor, weight: AdaptedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + bias + (x rightᵀ) leftᵀ."""
    result: Tensor = func(x, weight.weight, bias)
    for update in weight.updates:
        left, right = update.left.to(x.dtype), update.right.to(x.dtype)
        result = _plus(result, F.linear(update.dropout(x), right), left.T)
    return result


def _matmul(func: Any, one: Any, other: Any) -> Tensor:
    """Compute x W + (x left) right, or W x + left (right x) if the weight is the first factor."""
    if isinstance(other, AdaptedWeight):
        result: Tensor = func(one, other.weight)
        for update in other.updates:
            left, right = update.left.to(one.dtype), update.right.to(one.dtype)
            result = _plus(result, torch.matmul(update.dropout(one), left), right)
        return result
    result = func(one.weight, other)
    for update in one.updates:
        left, right = update.left.to(other.dtype), update.right.to(other.dtype)
        result = _plus(result, left, torch.matmul(right, update.dropout(other)))
    return result


def _grouped(func: Any, x: Tensor, weight: AdaptedWeight, offs: Tensor, **kwargs: Any) -> Tensor:
    """Multiply each row of x, (S, p), by its expert's matrix in W, (E, p, q), and add the updates.

    Rows are sorted by expert, and `offs` says where the rows of each expert end.
    """
    result: Tensor = func(x, weight.weight, offs=offs, **kwargs)
    for update in map(Update.padded, weight.updates):
        left, right = update.left.to(x.dtype), update.right.to(x.dtype)
        hidden = func(update.dropout(x), left, offs=offs)
        result = result + func(hidden, right, offs=offs).to(result.dtype)
    return result


_ATTENTION_PARAMETERS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def _attention(func: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Compute PyTorch's attention, on (T, B, d) or (T, d), with adapted projections.

    PyTorch's function multiplies by the projections of q, k and v if they are separate weights, so it gets them as
    separate ones. It takes the projection of the output only if that is a tensor. So it gets W_o with the rows of each
    `right` appended, and `_attention` multiplies the additional channels of its result by `left` and adds them. While
    dropout is in use, PyTorch's function gets the identity in place of W_o, and `_attention` projects its result.
    """
    # Arguments are told apart by the names that this release of PyTorch gives them.
    call = {**dict(zip(_ATTENTION_PARAMETERS, args, strict=False)), **kwargs}
    parts = zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), call["in_proj_weight"].chunk(3), strict=True)
    call |= {"use_separate_proj_weight": True, "in_proj_weight": None, **dict(parts)}
    projection, bias = call["out_proj_weight"], call["out_proj_bias"]
    if not isinstance(projection, AdaptedWeight):
        result: tuple[Tensor, Tensor | None] = func(**call)
        return result
    weight, updates = projection.weight, projection.updates
    if any(isinstance(update.dropout, nn.Dropout) and update.dropout.training for update in updates):
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        attended, weights = func(**call | {"out_proj_weight": identity, "out_proj_bias": None})
        return _linear(F.linear, attended, projection, bias), weights
    rights = [update.right.to(weight.dtype) for update in updates]
    sizes = [len(rows) for rows in (weight, *rights)]
    wide = {
        "out_proj_weight": torch.cat([weight, *rights]),
        "out_proj_bias": None if bias is None else F.pad(bias, (0, sum(sizes[1:]))),
    }
    output, weights = func(**call | wide)
    output, *hidden = output.split(sizes, dim=-1)
    for update, channels in zip(updates, hidden, strict=True):
        output = _plus(output, channels, update.left.to(channels.dtype).T)
    return output, weights


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _matmul),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
}


def _plus(result: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Compute result + one · other, in one operation if PyTorch has one for these shapes, in the result's dtype."""
    dtype = torch.promote_types(result.dtype, torch.promote_types(one.dtype, other.dtype))
    with autocast_off([result]):  # autocast has chosen the dtypes already, and would round a wider result
        wide, one, other = result.to(dtype), one.to(dtype), other.to(dtype)
        if other.ndim == 2:
            rows, channels = wide.reshape(-1, wide.shape[-1]), one.reshape(-1, one.shape[-1])
            total = torch.addmm(rows, channels, other).view(result.shape)
        elif wide.ndim == one.ndim == other.ndim == 3:
            total = torch.baddbmm(wide, one, other)
        else:
            total = wide + one @ other
    return total.to(result.dtype)
