"""Replacing linear layers of a model by factorised ones: all at once, or one by one in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibration.batches import OR_LOSS_FN, LossFunction, in_eval_mode, run_model
from ..calibration.input_moments import input_of, is_unchanged, version_of
from ..factorized.saved import name_tensors
from ..messages import first_few
from .methods import Method
from .report import Factorization
from .solvers.needed_statistics import empty_statistics
from .solvers.solve import Solution, factorize_weight
from .statistics.collect import measure
from .statistics.layer_statistics import LayerStatistics
from .targets import Layer, errors_naming, separate_replaceable


def layers_by_input(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, loss_fn: LossFunction | None = None
) -> list[list[str]]:
    """Give the names of layers that run in a batch, in the order in which they do.

    Layers that run right after each other on the same input tensor, such as q, k and v, form one group.
    """
    groups: list[list[str]] = []
    latest: Tensor | None = None
    version: int | None = None
    seen: set[str] = set()

    def note(name: str, inputs: Tensor) -> None:
        nonlocal latest, version
        if name in seen:  # a layer that runs several times in a batch has its place by the first run
            return
        seen.add(name)
        if is_unchanged(inputs, latest, version):
            groups[-1].append(name)
        else:
            groups.append([name])
        latest, version = inputs, version_of(inputs)

    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: note(name, input_of(args, kwargs)), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        with torch.inference_mode(False), torch.no_grad(), in_eval_mode(model):
            batch = send_to_device(batch, next(model.parameters()).device)
            if loss_fn is not None:
                loss_fn(model, batch)
            else:
                run_model(model, batch, OR_LOSS_FN)
    finally:
        for handle in handles:
            handle.remove()
    return groups


@dataclass
class Replacement:
    """A plan of `compress`: which layers get which rank, by which method."""

    model: nn.Module
    targets: dict[str, nn.Linear | Conv1D]
    ranks: dict[str, int]
    method: Method
    statistics: Mapping[str, LayerStatistics]

    def _solved(self, name: str, entry: LayerStatistics) -> Solution:
        return factorize_weight(self.targets[name], self.ranks[name], self.method, entry)

    def at_once(self, done: Callable[[], Any]) -> dict[str, float]:
        """Make all factorised layers, then put them into the model; call `done` after each. Returns losses by name."""
        made = {}
        for name in self.ranks:
            made[name] = self._solved(name, self.statistics.get(name, empty_statistics(self.targets[name])))
            done()
        replace_everywhere(self.model, {self.targets[name]: solution.layer for name, solution in made.items()})
        return {name: solution.lost for name, solution in made.items()}

    def in_order(
        self, batches: Iterable[Any], loss_fn: LossFunction | None, done: Callable[[], Any]
    ) -> dict[str, float]:
        """Replace one layer after the other, each with moments of the inputs that it gets from the layers before it.

        These layers are factorised by then, so errors are weighed by the inputs that the new layer will really get.
        """
        lost = {}
        with self._restored_on_error():
            layers = {name: self.targets[name] for name in self.ranks}
            groups = layers_by_input(self.model, layers, next(iter(batches)), loss_fn)
            silent = [repr(name) for name in self.ranks if not any(name in group for group in groups)]
            if silent:
                raise ValueError(
                    f"{first_few(silent)} never ran in the first batch of `sequential`. Pass batches that use it, or "
                    "leave it out of target_modules."
                )
            for group in groups:
                # All layers of a group get one input tensor, so the moments of the first layer are those of all.
                leader = {group[0]: self.targets[group[0]]}
                fresh = measure(self.model, leader, batches, ("inputs",), loss_fn)[group[0]]
                for name in group:
                    # Statistics of gradients stay those of the dense model: only the inputs are measured again.
                    entry = self.statistics.get(name, empty_statistics(self.targets[name]))
                    entry = replace(entry, moment=fresh.moment, mean=fresh.mean, count=fresh.count)
                    solution = self._solved(name, entry)
                    replace_everywhere(self.model, {self.targets[name]: solution.layer})
                    lost[name] = solution.lost
                    done()
        return lost

    @contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        # `named_children` leaves out further names of a shared module, so the private mapping is read.
        places = [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        try:
            yield
        except BaseException:  # also when the user interrupts a long run
            for parent, name, child in places:
                setattr(parent, name, child)
            name_tensors(self.model)
            raise


def replace_targets(
    model: nn.Module,
    targets: Mapping[str, Layer],
    make: Callable[[Layer], nn.Module | str],
    size: Callable[[Any], int] = attrgetter("rank"),
) -> Factorization:
    """Replace layers of a model, in place, after all new layers were made. If `make` raises, no layer is replaced.

    Args:
        model: the model, which is not itself a target.
        targets: layers by name. A layer with several names may be there under each of them.
        make: gives the new layer for a target, or the reason why the target stays as it is. It is called once for each
            target that `separate_replaceable` lets be replaced.
        size: gives the size to report of a new layer, such as its rank.

    Raises:
        ValueError: `make` raised it. The message then has the layer's name.
    """
    before = count_parameters(model)
    own, left = separate_replaceable(model, targets)
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
    """Replace modules of a model, in place, under all names that they have in it.

    Args:
        model: the model, which is not itself replaced.
        made: maps each module that goes to the one that takes its place.
    """
    # `named_children` leaves out further names of a shared module. The lists are copies, as the loops change the tree.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    name_tensors(model)
    for old, new in made.items():
        _move_hooks(old, new)


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Attributes with the hooks of a module on its calls and gradients. Hooks on its state are for the old keys."""


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a new layer the hooks that users put on the old one. Their handles remove them from the new one."""
    for attribute in HOOKS:
        hooks, own = getattr(old, attribute), getattr(new, attribute)
        # A handle holds the dictionary itself, so the new layer takes it over.
        hooks.update(own)
        setattr(new, attribute, hooks)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
    if hasattr(old, "_hf_hook"):  # accelerate has put it around the layer's forward
        add_hook_to_module(new, old._hf_hook)
