"""Cutting factorised layers back to a lower rank, for example after adapters were merged into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..arguments import check_argument, check_whole_number
from ..compiled import on_plain_model
from ..factorized import LowRankLinear
from ..factorized.base import check_values
from ..messages import first_few
from .methods import SVD, Activation
from .replacement import replace_everywhere
from .solvers.solve import factorize_weight
from .statistics.layer_statistics import LayerStatistics, check_finite, probe_of
from .targets import check_base, errors_naming


@on_plain_model
@torch.no_grad()
def truncate(
    model: nn.Module, ranks: int | Mapping[str, int], statistics: Mapping[str, LayerStatistics] | None = None
) -> dict[str, float]:
    """Replace `LowRankLinear` layers of a model, in place, by their best approximations of a lower rank.

    If an adapter of rank R is merged into a layer of rank r, the layer's rank becomes r + R. This function takes it
    back to r, or to any other rank. U V is the layer's weight and Û V̂ the approximation. Without statistics, Û V̂ is
    nearest to U V in the Frobenius norm. With statistics, the mean error of the output, E‖(U V − Û V̂) x‖², is least,
    and the bias makes up for the mean of that error, as with the method `Activation`.

    Args:
        model: the model, without adapters: merge them first.
        ranks: one rank for all layers, or a mapping from names of layers to ranks. With the report of `compress` it is
            `{layer.name: layer.rank for layer in report.layers if layer.rank}`. A layer stays as it is if its rank is
            not above the rank that it would get.
        statistics: maps names of layers to the moments of their inputs, which `calibrate` took with the dense model.
            Weights may have changed since then; the inputs are assumed to be still the same.

    Returns:
        A dict with the loss of each layer that was cut, by its name. The loss is ‖U V − Û V̂‖² / ‖U V‖² without
        statistics, and the same ratio for the outputs with them.

    Raises:
        ValueError: a name belongs to no `LowRankLinear`, a rank is less than 1, the statistics lack a layer's moment
            or are for another shape, factors are not finite, or the model has adapters. No layer is cut then.
    """
    check_argument("truncate(model, ranks)", "model", model, "an nn.Module")
    check_base(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    asked = dict(ranks) if isinstance(ranks, Mapping) else dict.fromkeys(layers, ranks)
    if not layers:
        raise ValueError(
            f"truncate: the {type(model).__name__} has no LowRankLinear to cut: compress it first, with `compress` "
            "or `factorize`."
        )
    unknown = [repr(name) for name in asked if name not in layers]
    if unknown:
        raise ValueError(
            f"ranks names {first_few(unknown)}, which is no LowRankLinear. Those of the model are "
            f"{first_few([repr(name) for name in layers])}."
        )
    for name, rank in asked.items():
        check_whole_number("rank", rank, of=f" of {name!r}")
    cut = {name: layers[name] for name, rank in asked.items() if rank < layers[name].rank}
    entries = {name: _entry(name, layer, statistics) for name, layer in cut.items()}
    method = SVD(asked) if statistics is None else Activation(asked)
    solutions = {name: factorize_weight(layer, asked[name], method, entries[name]) for name, layer in cut.items()}
    replace_everywhere(model, {cut[name]: solution.layer for name, solution in solutions.items()})
    return {name: solution.lost for name, solution in solutions.items()}


def _entry(name: str, layer: LowRankLinear, statistics: Mapping[str, LayerStatistics] | None) -> LayerStatistics:
    """Give the layer's entry in `statistics`, without gradients; or an empty entry if there are no statistics."""
    with errors_naming(name):
        check_values(layer.weight)
    # The weight is not compared with the one at calibration, as `compress` does: merging an adapter has changed it.
    shape = layer.out_features, layer.in_features
    if statistics is None:
        return LayerStatistics(shape, 0, probe_of(layer.weight))
    entry = statistics.get(name)
    if entry is None or entry.moment is None or not entry.count or entry.shape != shape:
        found = "nothing" if entry is None else f"{entry.count} positions and shape {entry.shape}"
        raise ValueError(
            f"statistics have {found} of {name!r}, whose shape is {shape}, and need the moment of its inputs: "
            "calibrate the dense model with statistics=['inputs'], or cut without them."
        )
    check_finite(name, entry)
    return replace(entry, fisher=None, gradients=None)
