"""`compress`: spends a budget on ranks of a model's linear layers, and replaces these by factorised ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, cast

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..arguments import check_argument, check_whole_number, short_form
from ..calibration.batches import LossFunction
from ..compiled import on_plain_model
from ..factorized.low_rank_linear import linear_shape
from ..messages import first_few
from .budget.costs import COSTS, Shape, nonzeros_of, ranks_that_pay
from .budget.depth import KEYS_AND_VALUES, block_numbers, depth_shares
from .budget.spend import (
    ALLOCATIONS,
    Candidate,
    check_budget,
    greedy_ranks,
    minimum_ranks,
    ranks_by_shares,
    total_cost,
)
from .methods import Method
from .replacement import Replacement
from .report import CompressionReport, LayerReport
from .solvers.low_rank import energies
from .solvers.needed_statistics import statistics_of
from .solvers.solve import move_statistics
from .solvers.table import SOLVERS, solver_of
from .statistics.layer_statistics import LayerStatistics
from .targets import check_base, factorizable_weight, linear_targets, reasons_of, separate_replaceable


@on_plain_model
@torch.no_grad()
def compress(
    model: nn.Module,
    method: Method,
    statistics: Mapping[str, LayerStatistics] | None = None,
    *,
    sequential: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    show_progress_bar: bool = True,
) -> CompressionReport:
    """Replace linear layers of a model, in place, by factorised ones that together cost no more than a budget.

    Each `nn.Linear` or transformers `Conv1D` among the targets becomes a `LowRankLinear`, or a `DictionaryLinear` if
    the method makes dictionaries. A target stays dense where that is better, or where no rank costs less than the
    dense layer. All arguments and statistics are checked before the model is changed, and without `sequential` all
    layers are made before. If something raises, the model is as it was.

    Args:
        model: the model, without adapters; a factorised one trains and takes adapters as before.
        method: what error each layer's factors minimise, the budget, and the targets: `SVD`, `Fisher`, `Activation`,
            `ActivationFisher`, `Dictionary` or `OneShotDictionary`.
        statistics: the result of `calibrate` or `load_statistics`; `SVD` needs none.
        sequential: batches with which moment and mean of each layer's inputs are measured again, in the order in which
            layers run, after the layers before have been compressed. Ranks still come from `statistics`.
        loss_fn: calls the model with these batches, if `model(**batch)` does not work for them.
        show_progress_bar: show progress over layers.

    Returns:
        A report of what each layer got and lost. `model.compression_report` keeps it too, for `save_compressed`.

    Raises:
        ValueError: a field of the method is unknown or out of range; a target matches nothing; the budget is below the
            cost of rank 1 in all layers; statistics are missing, not finite, of another model, or of a layer that has
            never run; a weight is quantized, on the meta device or not finite; or the model has adapters.
        TypeError: an argument is of another kind, for example because two are swapped.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        >>> report = compress(model, SVD(budget=0.5, allocation="uniform"), show_progress_bar=False)
        >>> [layer.rank for layer in report.layers]
        [21, 21]
    """
    call = "compress(model, Activation(budget=0.6), statistics)"
    check_argument(call, "model", model, "an nn.Module")
    check_method(call, method)
    needs = solver_of(method).needs
    if statistics is not None:
        check_argument(call, "statistics", statistics, "a mapping")
    elif needs:
        raise ValueError(
            f"{type(method).__name__} needs statistics: pass calibrate(model, dataloader, statistics={list(needs)!r})."
        )
    batches = None if sequential is None else list(sequential)
    if batches == []:
        raise ValueError("sequential gives no batches.")
    check_base(model)
    plan = Plan(model, method)
    entries = statistics or {}
    for name, layer in tqdm(plan.targets.items(), desc="Reading statistics", disable=not show_progress_bar):
        weight = factorizable_weight(name, layer)
        entry = statistics_of(name, layer, entries, method)
        # A sequential run measures the mean later. The bias that it brings must fit the budget now.
        plan.add(name, entry.count, entry.mean is not None or batches is not None, plan.gains(weight, entry))
    ranked = plan.ranked()
    replacement = Replacement(model, plan.targets, ranked, plan.method, entries)
    with tqdm(total=len(ranked), desc="Compressing", disable=not show_progress_bar) as progress:
        if batches is None:
            lost = replacement.at_once(progress.update)
        else:
            lost = replacement.in_order(batches, loss_fn, progress.update)
    report = plan.report(lost, batches is not None)
    cast(Any, model).compression_report = report
    return report


class Plan:
    """Which rank each layer of a model gets: first `add` is called for each target, then `ranked`, then `report`.

    Only sizes of the model's layers are read, so their weights may be on the meta device.

    Attributes:
        method: the method; with given ranks its allocation is "uniform", and its targets are the layers of the ranks.
        targets: the layers to compress, each under its first name.
        left: the reasons why other layers are left, by name.

    Raises:
        ValueError: a target matches nothing, or none can be replaced.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        self._given = method.budget if isinstance(method.budget, Mapping) else None
        if self._given is not None:
            # With given ranks there is nothing to allocate. "uniform" computes no gains, and costs are parameters.
            method = replace(method, allocation="uniform", target_modules="|".join(map(re.escape, self._given)))
        self.method = method
        self.targets, self.left = _targets(model, method)
        self._shapes: dict[str, Shape] = {}
        self._gains: dict[str, list[float]] = {}

    @property
    def needs_gains(self) -> bool:
        """Whether ranks depend on what each unit of rank gains, which only weights and statistics tell."""
        return self.method.allocation in ("greedy", "cost")

    def gains(self, weight: Tensor, entry: LayerStatistics) -> list[float]:
        """Give what each unit of a layer's rank gains, or nothing if ranks do not depend on it."""
        return _gains(weight, self.method, entry) if self.needs_gains else []

    def add(self, name: str, positions: int, has_mean: bool, gains: list[float]) -> None:
        """Note what is known of a target.

        Args:
            name: the target's name.
            positions: how many positions calibration has seen.
            has_mean: whether there is the mean of the inputs, with which a bias may make up for an error.
            gains: the result of `gains`.
        """
        gets_bias = self.method.compensate_bias and has_mean
        self._shapes[name] = _shape(self.targets[name], positions, self.method, gets_bias)
        self._gains[name] = gains

    def ranked(self) -> dict[str, int]:
        """Spend the budget; give the ranks of the targets that do not stay dense.

        Raises:
            ValueError: the budget is below the cost of rank 1 in all layers, or a given rank is out of range.
        """
        self._unit, costs = _costs(self._shapes, self.method)
        self._candidates = candidates = [
            Candidate(name, ranks_that_pay(costs[name], shape.max_rank), costs[name](None), self._gains[name])
            for name, shape in ((name, self._shapes[name]) for name in self.targets)
        ]
        self._before = sum(candidate.dense for candidate in candidates)
        if self._given is not None:
            self._ranks = _given(self._given, self.targets, self._shapes, candidates)
            self._limit = total_cost(candidates, self._ranks)
        else:
            self._limit = _limit(cast(Any, self.method.budget), self._before, self._unit)
            check_budget(candidates, self._limit, self._unit)
            self._ranks = _allocated(self.method, candidates, self.targets, self._limit)
        return {name: rank for name, rank in zip(self.targets, self._ranks, strict=True) if rank is not None}

    def report(self, lost: Mapping[str, float], sequential: bool) -> CompressionReport:
        """Report what each target got; `lost` has the errors of the layers that were replaced."""
        is_dictionary = solver_of(self.method).is_dictionary
        return CompressionReport(
            self.method.solver,
            self.method.allocation if self._given is None else "given",
            self._limit,
            self._unit,
            total_cost(self._candidates, self._ranks),
            self._before,
            [
                LayerReport(
                    name,
                    (shape.out_features, shape.in_features),
                    rank,
                    nonzeros_of(rank) if rank is not None and is_dictionary else None,
                    shape.parameters(None),
                    shape.parameters(rank),
                    lost.get(name, 0.0),
                    "" if rank is not None else "dense is better" if candidate.costs else "no rank pays",
                )
                for name, candidate, rank in zip(self.targets, self._candidates, self._ranks, strict=True)
                for shape in (self._shapes[name],)
            ],
            self.left,
            sequential,
        )


def check_method(call: str, method: Method) -> None:
    """Refuse a method whose fields are wrong for every model.

    Args:
        call: a right call of the function that got the method, for the error.
        method: what was given for the method.

    Raises:
        TypeError: it is no method that is registered.
        ValueError: a field has an unknown value, or the budget is neither a share nor a number nor a size.
    """
    if type(method) not in SOLVERS:
        raise TypeError(
            f"{call}: method must be one of {', '.join(kind.__name__ for kind in SOLVERS)}, and is "
            f"{short_form(method)}."
        )
    if method.allocation not in ALLOCATIONS:
        raise ValueError(
            f"allocation={method.allocation!r} is unknown; use one of {', '.join(map(repr, ALLOCATIONS))}."
        )
    if not callable(method.cost) and method.cost not in COSTS:
        raise ValueError(f"cost={method.cost!r} is unknown; use one of {', '.join(map(repr, COSTS))}, or a function.")
    budget = method.budget
    if isinstance(budget, Mapping):
        if not budget or not all(isinstance(name, str) for name in budget):
            raise ValueError(
                f"budget={dict(budget)!r} must map the full name of at least one layer, a str, to a rank, as "
                "{'head.0': 4}."
            )
    else:
        _limit(budget, 1.0, "bytes" if isinstance(budget, str) else "parameters")


def check_plan(model: nn.Module, method: Method) -> None:
    """Refuse what `compress` would refuse for the sizes of a model's layers, whose weights need no values yet.

    Raises:
        ValueError: a target matches nothing or cannot be replaced; allocation="depth" finds no numbered blocks; the
            budget is of a wrong kind for the unit of costs, or below the cost of rank 1 in all layers.
    """
    check_base(model)
    targets, _ = _targets(model, method)
    if method.allocation == "depth":
        block_numbers(targets)
    # A bias that compensation adds is left out, as only statistics tell whether there will be one.
    shapes = {name: _shape(layer, 1, method, gets_bias=False) for name, layer in targets.items()}
    unit, costs = _costs(shapes, method)
    candidates = [
        Candidate(name, ranks_that_pay(costs[name], shape.max_rank), costs[name](None))
        for name, shape in shapes.items()
    ]
    limit = _limit(cast(Any, method.budget), sum(candidate.dense for candidate in candidates), unit)
    if unit != "flops":  # how often layers run, which FLOPs depend on, is not known yet
        check_budget(candidates, limit, unit)


def _targets(model: nn.Module, method: Method) -> tuple[dict[str, nn.Linear | Conv1D], dict[str, str]]:
    """Give the layers to compress, each under its first name, and the reasons why others are left."""
    target_modules = method.target_modules
    if method.allocation == "depth" and target_modules is None:
        target_modules = rf"(.*\.)?({'|'.join(KEYS_AND_VALUES)})"
    targets, left = separate_replaceable(model, linear_targets(model, target_modules))
    if not targets:
        raise ValueError(f"No layer can be compressed. {reasons_of(left)}. Untie them, or name others.")
    return targets, left


def _allocated(
    method: Method, candidates: list[Candidate], targets: Mapping[str, nn.Module], limit: float
) -> list[int | None]:
    if method.allocation in ("greedy", "cost"):
        least = None if solver_of(method).is_loss else minimum_ranks(candidates, limit)
        return greedy_ranks(candidates, limit, least)
    shares = depth_shares(targets) if method.allocation == "depth" else [1.0] * len(candidates)
    return ranks_by_shares(candidates, shares, limit)


def _given(
    given: Mapping[str, int], names: Iterable[str], shapes: Mapping[str, Shape], candidates: list[Candidate]
) -> list[int | None]:
    """Give the caller's ranks in the order of `names`; None, for dense, where a rank saves nothing.

    Raises:
        ValueError: a name of `given` is no target, or its rank is out of range.
    """
    missing = [repr(name) for name in given if name not in shapes]
    if missing:
        raise ValueError(f"There are ranks of {first_few(missing)}, which is no linear layer of its own in the model.")
    ranks: list[int | None] = []
    for name, candidate in zip(names, candidates, strict=True):
        rank = given[name]
        check_whole_number("rank", rank, most=shapes[name].max_rank, of=f" of {name!r}")
        ranks.append(rank if rank <= len(candidate.costs) else None)
    return ranks


def _shape(layer: nn.Linear | Conv1D, positions: int, method: Method, gets_bias: bool) -> Shape:
    n, m = linear_shape(layer)
    return Shape(
        m,
        n,
        layer.weight.dtype,
        has_bias=layer.bias is not None,
        gets_bias=gets_bias,
        is_dictionary=solver_of(method).is_dictionary,
        positions=max(positions, 1),
    )


def _gains(weight: Tensor, method: Method, entry: LayerStatistics) -> list[float]:
    """Give what each unit of rank takes off the loss, in numbers that can be compared between layers."""
    kind = solver_of(method)
    compensates = method.compensate_bias and entry.mean is not None
    found = energies(weight, kind.metric(method, move_statistics(entry, weight.device), compensates))
    if kind.is_loss:
        # E[g gᵀ] is a mean over positions. Each position adds a term to the loss, so the mean is made a sum again.
        return (found * (entry.count if "gradients" in kind.needs else 1)).tolist()
    total = found.sum()
    return (found / total if bool(total > 0) else found).tolist()


def _costs(shapes: Mapping[str, Shape], method: Method) -> tuple[str, dict[str, Any]]:
    """Give the unit of costs, and for each layer a function from a rank, or None for dense, to its cost."""
    cost = method.cost
    if method.allocation != "cost":
        in_bytes = isinstance(method.budget, str)
        unit = "bytes" if in_bytes else "parameters"
        return unit, {name: shape.bytes if in_bytes else shape.parameters for name, shape in shapes.items()}
    if callable(cost):
        return "cost", {
            # Defaults bind this layer's name and shape: a lambda would otherwise see those of the last layer.
            name: lambda rank, name=name, shape=shape: cost(name, shape.out_features, shape.in_features, rank)
            for name, shape in shapes.items()
        }
    return cost, {name: getattr(shape, cost) for name, shape in shapes.items()}


def _limit(budget: float | int | str, before: float, unit: str) -> float:
    """Give the budget in its unit.

    Raises:
        ValueError: the budget is neither a share, nor a number of at least 1, nor a size.
    """
    if isinstance(budget, str):
        try:
            size = convert_file_size_to_int(budget)
        except ValueError:
            size = 0  # accelerate's message does not name the argument; the one below does
        if size < 1 or unit != "bytes":
            raise ValueError(
                f"budget={budget!r} must be a share such as 0.6, a number of parameters, or a size such as '48MB'"
                f"{'' if unit == 'bytes' else f', and cannot be one where {unit} are counted'}."
            )
        return float(size)
    # numpy's numbers are Real and Integral too.
    if isinstance(budget, Real) and not isinstance(budget, Integral) and 0 < budget < 1:
        # Parameters, bytes and flops are whole numbers, so a share of them is rounded down.
        share = float(budget) * before
        return share if unit == "cost" else math.floor(share)
    if isinstance(budget, Integral) and not isinstance(budget, bool) and budget >= 1:
        return int(budget)
    raise ValueError(
        f"budget={short_form(budget)} must be a share between 0 and 1, as 0.6, an int of at least 1, or a size in "
        "bytes, as '48MB'."
    )
