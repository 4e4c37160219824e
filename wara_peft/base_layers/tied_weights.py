"""Finds which parameters of a model are tied: the loaded model tells that, whatever its config says."""

from __future__ import annotations

from torch import nn


def names_by_parameter(model: nn.Module, in_every_place: bool = False) -> dict[int, list[str]]:
    """Map the `id` of each parameter to its names in a model. A tied parameter has a name in each of its modules.

    Args:
        model: the model.
        in_every_place: whether a module that stands in several places of the model counts in all of them. Otherwise
            it counts only in the first.
    """
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=not in_every_place):
        for name, parameter in module.named_parameters(module_name, recurse=False):
            names.setdefault(id(parameter), []).append(name)
    return names


def modules_by_parameter(model: nn.Module, in_every_place: bool = False) -> dict[int, list[str]]:
    """Map the `id` of each parameter to the names of its modules; see `names_by_parameter`."""
    names_of = names_by_parameter(model, in_every_place)
    return {key: [name.rpartition(".")[0] for name in names] for key, names in names_of.items()}
