"""Which parameters of a model are tied: a fact of the loaded model, whatever its config says."""

from __future__ import annotations

from torch import nn


def names_by_parameter(model: nn.Module, in_every_place: bool = False) -> dict[int, list[str]]:
    """The names of each parameter in a model, by its `id`: a tied parameter has one in each module that it is in.

    Args:
        model: the model.
        in_every_place: whether a module that stands in several places of the model counts in all of them; else it
            counts once, in the first.
    """
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=not in_every_place):
        for name, parameter in module.named_parameters(module_name, recurse=False):
            names.setdefault(id(parameter), []).append(name)
    return names


def modules_by_parameter(model: nn.Module, in_every_place: bool = False) -> dict[int, list[str]]:
    """The names of the modules that have each parameter, by its `id`; see `names_by_parameter`."""
    names_of = names_by_parameter(model, in_every_place)
    return {key: [name.rpartition(".")[0] for name in names] for key, names in names_of.items()}
