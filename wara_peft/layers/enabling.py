"""Enables adapters so that the same parameters train as before they were disabled.

PEFT lets every parameter of the active adapters train then, also those that a user had frozen.
"""

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
    """Enable or disable adapters by PEFT's function, and then correct which parameters train.

    PEFT freezes all adapters when it disables them. Once they are enabled again, a parameter trains if it trained
    before, or was set to train meanwhile. If other adapters are active by then, it must also belong to one of them.

    Args:
        enabled: True to enable adapters, False to disable them.
        before: the value that this function returned when they were disabled; None for adapters that are enabled.
        parameters: by name, the parameters whose `requires_grad` PEFT changes.
        active: names of the active adapters.
        pefts: PEFT's function that enables and disables.

    Returns:
        The value for `before` at the next call; None if the adapters are enabled now.
    """
    now = TrainedBefore(frozenset(name for name, value in parameters.items() if value.requires_grad), tuple(active()))
    pefts(enabled)
    if not enabled:
        return before or now  # adapters that are disabled twice train later as they did before the first time
    before = before or now
    same = before.active == tuple(active())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in before.names | now.names and (same or parameter.requires_grad))
    return None
