"""Adapters that were disabled train again as they did before, and no others do: PEFT lets all active ones train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class TrainedBefore:
    """Records which parameters trained when adapters were disabled.

    Attributes:
        names: names of the parameters.
        active: names of the adapters that were active.
    """

    names: frozenset[str]
    active: tuple[str, ...]


def enable_adapters(
    enabled: bool,
    before: TrainedBefore | None,
    parameters: Mapping[str, nn.Parameter],
    active: Callable[[], Sequence[str]],
    pefts: Callable[[bool], None],
) -> TrainedBefore | None:
    """Enable or disable adapters as PEFT does, which freezes all of them, and when enabled lets the active ones train.

    Enabled again, a parameter trains if it did before, or was set to train meanwhile. If other adapters are active
    then, it also has to be of one of those.

    Args:
        enabled: whether to enable or to disable them.
        before: what this returned when they were disabled; None for adapters that are enabled.
        parameters: by name those whose `requires_grad` PEFT changes.
        active: names of the active adapters.
        pefts: PEFT's function that enables and disables.

    Returns:
        The value for `before` at the next call; None where the adapters are enabled now.
    """
    now = TrainedBefore(frozenset(name for name, value in parameters.items() if value.requires_grad), tuple(active()))
    pefts(enabled)
    if not enabled:
        return before or now
    before = before or now
    same = before.active == tuple(active())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in before.names | now.names and (same or parameter.requires_grad))
    return None
