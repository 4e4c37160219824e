"""Putting factorised layers in the place of linear ones: all at once, or one after the other in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibration.batches import LossFunction, arguments_of, in_eval_mode
from ..messages import first_few
from .report import Factorization
from .solvers.needed_statistics import empty_statistics
from .solvers.solve import Solution, factorize_weight
from .statistics.collect import measure
from .statistics.layer_statistics import LayerStatistics
from .targets import Layer, errors_naming, separate_tied


@dataclass
class Replacement:
    """Which layers get which rank, and how they are replaced."""

    model: nn.Module
    targets: dict[str, nn.Linear | Conv1D]
    ranks: dict[str, int]
    solver: str
    statistics: Mapping[str, LayerStatistics]
    compensate_bias: bool

    def _solved(self, name: str, entry: LayerStatistics) -> Solution:
        return factorize_weight(self.targets[name], self.ranks[name], self.solver, entry, self.compensate_bias)

    def at_once(self, done: Callable[[], Any]) -> dict[str, float]:
        """Replace all layers when all are made; returns what each has lost."""
        made = {}
        for name in self.ranks:
            made[name] = self._solved(name, self.statistics.get(name, empty_statistics(self.targets[name])))
            done()
        replace_everywhere(self.model, {self.targets[name]: solution.layer for name, solution in made.items()})
        return {name: solution.lost for name, solution in made.items()}

    def in_order(self, batches: list[Any], loss_fn: LossFunction | None, done: Callable[[], Any]) -> dict[str, float]:
        """Replace layer after layer, with moments of the inputs that the layers before make now."""
        lost = {}
        with self._restored_on_error():
            for group in self._groups(batches[0], loss_fn):
                leader = {group[0]: self.targets[group[0]]}  # the others have the same input
                fresh = measure(self.model, leader, batches, ("inputs",), loss_fn)[group[0]]
                for name in group:
                    entry = self.statistics.get(name, empty_statistics(self.targets[name]))
                    entry = replace(entry, moment=fresh.moment, mean=fresh.mean, count=fresh.count)
                    solution = self._solved(name, entry)
                    replace_everywhere(self.model, {self.targets[name]: solution.layer})
                    lost[name] = solution.lost
                    done()
        return lost

    def _groups(self, batch: Any, loss_fn: LossFunction | None) -> list[list[str]]:
        """Names in the order in which the layers run, those together that get one tensor right after each other."""
        groups: list[list[str]] = []
        latest: Tensor | None = None
        seen: set[str] = set()

        def note(name: str, inputs: Tensor) -> None:
            nonlocal latest
            if name in seen:
                return
            seen.add(name)
            if inputs is latest:
                groups[-1].append(name)
            else:
                groups.append([name])
            latest = inputs

        handles = [
            self.targets[name].register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            for name in self.ranks
        ]
        try:
            with in_eval_mode(self.model):
                batch = send_to_device(batch, next(self.model.parameters()).device)
                if loss_fn is not None:
                    loss_fn(self.model, batch)
                else:
                    args, kwargs = arguments_of(batch)
                    self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        silent = [repr(name) for name in self.ranks if name not in seen]
        if silent:
            raise ValueError(
                f"{first_few(silent)} never ran in the first batch of `sequential`. Pass batches that use it, or "
                "leave it out of target_modules."
            )
        return groups

    @contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        places = [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        try:
            yield
        except BaseException:
            for parent, name, child in places:
                setattr(parent, name, child)
            raise


def replace_targets(
    model: nn.Module,
    targets: Mapping[str, Layer],
    make: Callable[[Layer], nn.Module | str],
    size: Callable[[Any], int] = attrgetter("rank"),
) -> Factorization:
    """Replace layers of a model, in place, once all that replaces them is made; if something raises, none is replaced.

    Args:
        model: not itself among the targets.
        targets: by name; a layer with several names may be under each of them.
        make: makes what replaces a layer, or says why the layer is left. It is called once for each layer whose
            weights no other module has.
        size: the rank, or another size to report, of what was made.

    Raises:
        ValueError: `make` raised one; it has the layer's name then.
    """
    before = count_parameters(model)
    own, left = separate_tied(model, targets)
    made: dict[nn.Module, nn.Module] = {}
    reasons: dict[nn.Module, str] = {}
    for name, layer in own.items():
        with errors_naming(name):
            new = make(layer)
        if isinstance(new, str):
            reasons[layer] = new
        else:
            made[layer] = new.train(layer.training)
    replace_everywhere(model, made)
    left |= {name: reasons[layer] for name, layer in targets.items() if layer in reasons}
    replaced = {name: size(made[layer]) for name, layer in targets.items() if layer in made}
    return Factorization(replaced, left, before, count_parameters(model))


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def replace_everywhere(model: nn.Module, made: Mapping[Any, nn.Module]) -> None:
    """Put modules in the place of others, under all their names.

    Args:
        model: not itself among those replaced.
        made: by the module that each replaces.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
