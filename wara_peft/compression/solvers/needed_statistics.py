"""Checks that statistics belong to a layer and have the moments that a solver needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...factorized.low_rank_linear import linear_shape
from ...messages import first_few
from ..methods import Method
from ..statistics.layer_statistics import LayerStatistics, check_finite, probe_of
from .table import solver_of

TOLERANCE = 0.1
"""Largest relative difference between entries of a weight now and at calibration. Training moves them a little."""


def statistics_of(
    name: str, layer: nn.Linear | Conv1D, statistics: Mapping[str, LayerStatistics], method: Method
) -> LayerStatistics:
    """Give the statistics of a layer, which are empty if the method needs none and there are none.

    Raises:
        ValueError: there are none and the method needs some; they are of a layer with another shape or other weights;
            or they lack a kind that the method needs, or it is zero or not finite.
    """
    needs = solver_of(method).needs
    if name not in statistics:
        if not needs:
            return empty_statistics(layer)
        others = [repr(other) for other in statistics]
        raise ValueError(
            f"statistics have nothing of {name!r}, but of {first_few(others) or 'no layer'}: "
            "they are of another model, or of other targets. Calibrate this one."
        )
    entry = statistics[name]
    n, m = linear_shape(layer)
    now = probe_of(layer.weight)
    if entry.shape != (m, n):
        raise ValueError(
            f"statistics of {name!r} are of a layer of shape {entry.shape}, not {(m, n)}: of another model. Calibrate "
            "this one."
        )
    difference = float((entry.probe.float() - now).norm() / now.norm().clamp(min=torch.finfo(now.dtype).tiny))
    if difference > TOLERANCE:
        raise ValueError(
            f"statistics of {name!r} are of a layer with other weights, {difference:.0%} away: of another model, or "
            "of this one before it was trained. Calibrate this one."
        )
    if needs and entry.count == 0:
        raise ValueError(
            f"{name!r} never ran during calibration, in 0 positions. Calibrate with batches that use it, or leave it "
            "out of target_modules."
        )
    there = {"inputs": entry.moment, "gradients": entry.gradients, "fisher": entry.fisher}
    for kind in needs:
        found = there[kind]
        if found is None:
            raise ValueError(
                f"statistics of {name!r} have no {kind!r}, which {type(method).__name__} needs: calibrate with "
                f"statistics={list(needs)!r}."
            )
        if kind != "inputs" and not bool(found.any()):
            raise ValueError(
                f"The {kind} of {name!r} are zero: no gradient reaches it in these batches. Calibrate with batches "
                "that use it, or leave it out of target_modules."
            )
    check_finite(name, entry)
    return entry


def empty_statistics(layer: nn.Linear | Conv1D) -> LayerStatistics:
    """Make statistics for a layer that no batch has run through."""
    n, m = linear_shape(layer)
    return LayerStatistics((m, n), 0, probe_of(layer.weight))
