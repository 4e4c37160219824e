"""Which weights a factor can have, and how far another one is from these."""

from __future__ import annotations

import torch
from torch import Tensor

from ..forms import ExpertsFactor, SubbandFactor
from ..forms.factors import IN_DIM


def factor_from_weight(factor: SubbandFactor, weight: Tensor) -> Tensor:
    """A weight of PEFT's in the shape in which the factor gives it.

    Experts follow each other in the rows of LoRA's A, (E R, n), and alternate in the columns of its B, (m, R E).
    """
    if not isinstance(factor, ExpertsFactor):
        return weight if factor.dim == IN_DIM else weight.flatten(1)  # a convolution's B has a kernel of size one
    if factor.dim == IN_DIM:
        return weight.view(factor.experts, -1, weight.shape[1])
    return weight.view(len(weight), -1, factor.experts).permute(2, 0, 1)


def nearest_coefficients(factor: SubbandFactor, values: Tensor) -> tuple[float, list[Tensor | None]]:
    """How far values are from those that a factor can have, and the coefficients of the nearest ones, in float64.

    The distance is the largest of all rows of Â, or columns of B̂, each as a share of the row's norm.
    """
    values = values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)
    found = factor.nearest(values)
    rest = values - factor.synthesis_of(found)
    others = [dim for dim in range(values.ndim) if dim != factor.rank_dim]
    norms, distances = (tensor.square().sum(others).sqrt() for tensor in (values, rest))
    shares = torch.where(norms == 0, 0, distances / norms.clamp_min(torch.finfo(torch.float64).tiny))  # or NaN
    return float(shares.max()), found


def rounding_tolerance(factor: SubbandFactor, weight: Tensor) -> float:
    """The distance up to which a weight counts as one that the factor can have: each level rounds once.

    A weight may have been saved in a narrower dtype than it has now. The narrowest that holds all its values counts.
    """
    narrower = (torch.bfloat16, torch.float16, torch.float32)
    exact = (dtype for dtype in narrower if torch.equal(weight.to(dtype).to(weight.dtype), weight))
    return 2 * factor.axis.levels * torch.finfo(next(exact, weight.dtype)).eps


def describe_distance(factor: SubbandFactor, distance: float) -> str:
    """Say how far a weight is from those that the factor can have."""
    ranks = ", ".join(f"{name}={rank}" for name, rank in factor.ranks.items())
    return (
        f"it is not in the span of wavelet={factor.axis.wavelet!r}, levels={factor.axis.levels} with the ranks "
        f"{ranks} (a row is off by {distance:.1%} of its norm)"
    )
