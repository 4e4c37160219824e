"""Keeps what a model writes into a config, so that the same config can serve several models.

PEFT resolves a config in the user's own object: it replaces "all-linear", for example, by names of layers. A second
model must start from what the user wrote, and each model must save what it resolved itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = ("target_modules", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern")
"""Fields into which a tuner writes names that it finds in the model: of linear layers, experts and tied modules."""
TIES = ("modules_to_tie", "target_modules_to_tie")
"""Attributes, not fields, into which a tuner writes the names of modules whose weights the model ties."""


@dataclass(frozen=True)
class Resolution:
    """Records how a model has resolved a config; it is an attribute of that config.

    Attributes:
        pairs: for each field that the last model has resolved, the value it wrote and the value of the user before.
        in_model: the values of fields in the model that was last asked for the adapter, with those that the model has
            found out (`module_shapes`, hashes). The layers of the adapter keep the same mapping.
    """

    pairs: Mapping[str, tuple[Any, Any]]
    in_model: Mapping[str, Any]


def take_back_resolution(config: Any) -> dict[str, Any]:
    """Put the user's values back into fields that an earlier model has resolved, and return those of all such fields.

    A field that the user has changed since then keeps its value.
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
    """Note on a config how a model has resolved it, and return the values of its fields in that model.

    Args:
        config: the resolved config.
        written: the result of `take_back_resolution`: values of the user.
        found: values of further fields, which the model has found out.
    """
    in_model = {name: copy.copy(getattr(config, name)) for name in (*TARGETS, *TIES)} | dict(found)
    # `modules_to_save` is not copied: PEFT adds the head of a task to this very list later.
    pairs = {name: (in_model.get(name, getattr(config, name)), value) for name, value in written.items()}
    config.resolution = Resolution(pairs, in_model)
    return in_model


def note_for_saving(config: Any, in_model: Mapping[str, Any]) -> None:
    """Note that the config will be written next, with the values that its fields have in one model."""
    config.resolution = Resolution({} if config.resolution is None else config.resolution.pairs, in_model)


def config_in_model(config: Any, in_model: Mapping[str, Any]) -> Any:
    """Copy a config, with the values that its fields have in a model."""
    copied = copy.copy(config)
    vars(copied).update(in_model)
    return copied


def config_to_write(config: Any) -> Any:
    """Copy a config, with the values of the model that was last asked, except for fields that a user changed since."""
    if config.resolution is None:
        return config
    pairs = config.resolution.pairs
    changed = {name for name, (resolved, _) in pairs.items() if getattr(config, name) != resolved}
    in_model = config.resolution.in_model
    return config_in_model(config, {name: value for name, value in in_model.items() if name not in changed})
