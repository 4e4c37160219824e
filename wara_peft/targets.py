"""What is checked of any adapter before the first module is replaced."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from .config import WaRAConfig, value_for
from .messages import first


def check_adapter_name(adapter_name: str) -> None:
    """Refuse a name that is also that of a parameter.

    Raises:
        ValueError: it is.
    """
    if re.fullmatch(r"([AB]_)?level\d+|[ad][ad]\d+|weight", adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a parameter of WaRA adapters, and saving would write "
            "an empty file. Choose another name."
        )


def check_ranks(config: WaRAConfig, names: Iterable[str]) -> None:
    """Refuse a config that leaves one of the modules without any rank.

    Raises:
        ValueError: it does.
    """
    empty = [repr(name) for name in names if not any(config.ranks_of(name).values())]
    if empty:
        raise ValueError(
            f"rank_pattern leaves every subband out in module {first(empty)}. Give at least one a rank, or leave the "
            "module out with `exclude_modules`."
        )


def warn_of_unmatched(config: WaRAConfig) -> None:
    """Warn, as PEFT does of modules alone, of patterns that match nothing that has been adapted."""
    for field_name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field_name)
        unmatched = [
            pattern
            for pattern in sorted(patterns)
            if not any(value_for(name, field_name, {pattern: True}, False) for name in config.module_shapes or {})
        ]
        if unmatched:
            warnings.warn(
                f"The following {field_name} keys did not match any targeted module and were ignored: {unmatched}.",
                RuntimeWarning,
            )
