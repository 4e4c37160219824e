"""Cutting factorised layers back to a lower rank, as after adapters have been merged into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..arguments import check_argument, check_whole_number
from ..compiled import on_plain_model
from ..factorized import LowRankLinear
from ..messages import first_few
from .replacement import replace_everywhere
from .solvers.solve import factorize_weight
from .statistics.layer_statistics import LayerStatistics, check_finite, probe_of
from .targets import check_base


@on_plain_model
@torch.no_grad()
def truncate(
    model: nn.Module, ranks: int | Mapping[str, int], statistics: Mapping[str, LayerStatistics] | None = None
) -> dict[str, float]:
    """Cut `LowRankLinear` layers of a model, in place, to the best approximations of a lower rank.

    Merging an adapter of rank R into a layer of rank r makes its rank r + R; this takes it back to r, or to any other.
    Without statistics Û V̂ is nearest to U V in the Frobenius norm. With them it loses least of the output,
    E‖(U V − Û V̂) x‖², and the bias makes up for the mean of what it loses, as by `compress(solver="activation")`.

    Args:
        model: the model, without adapters: merge them first.
        ranks: of each layer by its name, such as `{layer.name: layer.rank for layer in report.layers if layer.rank}`
            of the report of `compress`; or one for all that have more. A layer that has no more stays as it is.
        statistics: moments of the inputs by the layers' names, as `calibrate` took them of the dense model: layers are
            still known by their inputs there, though weights have changed.

    Returns:
        By name, what each layer that was cut has lost, ‖U V − Û V̂‖² as a share of ‖U V‖², or the same of the output.

    Raises:
        ValueError: a name is that of no `LowRankLinear`, a rank is less than 1, the statistics lack a layer's moment
            or are of another shape, or the model has adapters. Nothing is cut then.
    """
    check_argument("truncate(model, ranks)", "model", model, "an nn.Module")
    check_base(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    asked = dict(ranks) if isinstance(ranks, Mapping) else dict.fromkeys(layers, ranks)
    unknown = [repr(name) for name in asked if name not in layers]
    if unknown or not layers:
        raise ValueError(
            f"{first_few(unknown) if unknown else 'The model'} is no LowRankLinear, and has none. Those of the model "
            f"are {first_few([repr(name) for name in layers]) if layers else 'none: compress it first'}."
        )
    for name, rank in asked.items():
        check_whole_number("rank", rank, of=f" of {name!r}")
    cut = {name: layers[name] for name, rank in asked.items() if rank < layers[name].rank}
    entries = {name: _entry(name, layer, statistics) for name, layer in cut.items()}
    solver = "svd" if statistics is None else "activation"
    solutions = {name: factorize_weight(layer, asked[name], solver, entries[name]) for name, layer in cut.items()}
    replace_everywhere(model, {cut[name]: solution.layer for name, solution in solutions.items()})
    return {name: solution.lost for name, solution in solutions.items()}


def _entry(name: str, layer: LowRankLinear, statistics: Mapping[str, LayerStatistics] | None) -> LayerStatistics:
    """What is known of a layer's inputs, if they are asked for."""
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
