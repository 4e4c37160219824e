"""Making a factorised layer from a linear one with a solver of `table.py`."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...factorized import DictionaryLinear, LowRankLinear
from ...factorized.low_rank_linear import linear_shape
from ...factorized.sparse_rows import pack_bits
from ..budget.costs import nonzeros_of
from ..methods import Method
from ..statistics.layer_statistics import LayerStatistics
from .low_rank import low_rank
from .table import solver_of


class Solution(NamedTuple):
    """A factorised layer and its error, divided by the error of a layer that outputs zero."""

    layer: LowRankLinear | DictionaryLinear
    lost: float


@torch.no_grad()
def factorize_weight(
    layer: nn.Linear | Conv1D | LowRankLinear,
    rank: int,
    method: Method,
    statistics: LayerStatistics,
) -> Solution:
    """Make a factorised layer from a layer, which itself stays as it is.

    If the statistics have the mean μ of the inputs, the bias b becomes b + (W − Ŵ) μ, so that the mean output stays
    the same. Solvers that weigh errors by inputs then weigh them about their mean. Together the two give the least
    error of the output that this rank allows.

    Args:
        layer: the layer, with the weight W, (m, n), and maybe a bias b. It may be factorised already.
        rank: r, or the number of atoms of a dictionary.
        method: the method; its budget and targets do not matter here.
        statistics: statistics of this layer, with the kinds that the method needs.

    Returns:
        The factorised layer, with the device, dtype, mode and `requires_grad` of the layer.
    """
    weight = layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
    kind = solver_of(method)
    compensates = method.compensate_bias and statistics.mean is not None
    metric = kind.metric(method, move_statistics(statistics, weight.device), compensates)
    n, m = linear_shape(layer)
    bias = layer.bias is not None or compensates
    trains = next(layer.parameters()).requires_grad  # the weight's, or that of a factor
    made: LowRankLinear | DictionaryLinear
    if kind.learn is not None:
        found = kind.learn(method, weight, rank, nonzeros_of(rank), metric)
        made = DictionaryLinear(n, m, rank, nonzeros_of(rank), bias, device="meta", dtype=weight.dtype)
        # Made on the meta device first: initial values would take time, and change the state of the random generator.
        made.to_empty(device=weight.device)
        made.down.weight.copy_(found.atoms)
        made.values.copy_(found.values)
        made.support.copy_(pack_bits(found.places))
        difference = weight.double() - found.weight
        energy = float(metric.error(weight))
        lost = float(metric.error(difference))
        made.values.requires_grad_(trains)
    else:
        factors = low_rank(weight, rank, metric)
        made = LowRankLinear(n, m, rank, bias, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
        made.set_matrices(factors.up, factors.down)
        difference = weight.double() - factors.up @ factors.down
        lost, energy = factors.lost, factors.energy
        made.up.weight.requires_grad_(trains)
    made.down.weight.requires_grad_(trains)
    if made.bias is not None:
        # The sum is made in float64 and rounded once.
        value = torch.zeros(m, dtype=torch.float64, device=weight.device)
        if layer.bias is not None:
            value += layer.bias
        if compensates:
            value += difference @ cast(Tensor, statistics.mean).to(weight.device).double()
        made.bias.copy_(value)
        made.bias.requires_grad_(trains if layer.bias is None else layer.bias.requires_grad)
    return Solution(made.train(layer.training), lost / energy if energy > 0 else 0.0)


def move_statistics(statistics: LayerStatistics, device: torch.device) -> LayerStatistics:
    """Give statistics with all their tensors on a device."""
    tensors = {name: tensor.to(device) for name, tensor in statistics.tensors().items()}
    return LayerStatistics(statistics.shape, statistics.count, **tensors)
