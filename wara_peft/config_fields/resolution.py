"""Configs as a model resolves them: PEFT resolves the user's own object in place, so each model keeps its result."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = ("target_modules", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern")
"""Fields in which a tuner writes the names that it has found in the model: of linear layers, experts and ties."""
TIES = ("modules_to_tie", "target_modules_to_tie")
"""Attributes, no fields, in which a tuner writes what the model ties."""


@dataclass(frozen=True)
class Resolution:
    """How a model has resolved a config, kept on the config.

    Attributes:
        pairs: for each field that the last model has resolved what it wrote there, and what its user had written.
        in_model: fields as they are in the model that was last asked for the adapter, with what it has found out
            (`module_shapes`, hashes). The layers of the adapter keep the same mapping.
    """

    pairs: Mapping[str, tuple[Any, Any]]
    in_model: Mapping[str, Any]


def take_back_resolution(config: Any) -> dict[str, Any]:
    """Take back, in place, what an earlier model has resolved, and return the fields that a tuner resolves.

    A field that its user has changed since then stays as it is.
    """
    if config.resolution is not None:
        for name, (resolved, written) in config.resolution.pairs.items():
            if getattr(config, name) == resolved:
                setattr(config, name, written)
        for name in TIES:
            setattr(config, name, None)
        config.resolution = None
    return {name: getattr(config, name) for name in (*TARGETS, "modules_to_save")}


def note_resolution(config: Any, written: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Note on a config how a model has resolved it, and return the fields as they are in that model.

    Args:
        config: the config, resolved.
        written: what `take_back_resolution` has returned.
        found: further fields, which the model has found out.
    """
    in_model = {name: copy.copy(getattr(config, name)) for name in (*TARGETS, *TIES)} | dict(found)
    # `modules_to_save` is not copied: PEFT adds the head of a task to this very list later.
    pairs = {name: (in_model.get(name, getattr(config, name)), value) for name, value in written.items()}
    config.resolution = Resolution(pairs, in_model)
    return in_model


def note_for_saving(config: Any, in_model: Mapping[str, Any]) -> None:
    """Note that the config will be written next, for the model that has these fields."""
    config.resolution = Resolution({} if config.resolution is None else config.resolution.pairs, in_model)


def config_in_model(config: Any, in_model: Mapping[str, Any]) -> Any:
    """A copy of a config with its fields as they are in a model."""
    copied = copy.copy(config)
    vars(copied).update(in_model)
    return copied


def config_to_write(config: Any) -> Any:
    """A copy of a config with its fields as they are in the model that was last asked, unless changed since then."""
    if config.resolution is None:
        return config
    pairs = config.resolution.pairs
    changed = {name for name, (resolved, _) in pairs.items() if getattr(config, name) != resolved}
    in_model = config.resolution.in_model
    return config_in_model(config, {name: value for name, value in in_model.items() if name not in changed})
