"""What is checked of any adapter before the first module is replaced."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import WaRAConfig
from .factorized import LowRankLinear
from .kinds import kind_of
from .lora_fields import BOTH
from .messages import first
from .own_forward import TRIED, has_own_forward, reason_against_adapting
from .patterns import value_for


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


def check_factors(config: WaRAConfig, targets: Mapping[str, nn.Module]) -> None:
    """Refuse what cannot be done with a factorised layer as a whole: its factors too, or its bias by itself.

    Args:
        config: the config.
        targets: base layers that are to be adapted, by name.

    Raises:
        ValueError: a factor of such a target is one too, or has an adapter, or its bias is to train and be saved
            under a name under which PEFT does not look for it.
    """
    for name, base in targets.items():
        if not kind_of(base).is_factorized:
            continue
        adapted = [
            f"{name}.{factor}"
            for factor, layer in base.named_children()
            if f"{name}.{factor}" in targets or isinstance(layer, BaseTunerLayer)
        ]
        if adapted:
            raise ValueError(
                f"Target module {name!r} is a {type(base).__name__}, and so is its factor {adapted[0]!r} to be "
                "adapted, or is already. Target the layer as a whole, by its name, or its factors, not both."
            )
        if config.bias == "wara_only" and isinstance(base, LowRankLinear) and base.bias is not None:
            raise ValueError(
                f"bias='wara_only' would train the bias of {name!r}, a LowRankLinear, and not save it: PEFT looks for "
                "it beside the weight, and it lies in the factor `up`. Use bias='none' or 'all', or target `up`."
            )


def check_forwards(targets: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose own forward makes something to which an adapter's product cannot be added.

    Raises:
        ValueError: one of the base layers is such a layer.
    """
    for name, base in targets.items():
        if isinstance(base, TRIED) and isinstance(base._parameters.get("weight"), Tensor) and has_own_forward(base):
            reason = reason_against_adapting(base)
            if reason is not None:
                raise ValueError(
                    f"Target module {name!r}, a {type(base).__name__}, cannot be adapted: {reason}. Leave it out with "
                    "`exclude_modules`, or train it in full with `modules_to_save`."
                )


def warn_of_unmatched(
    config: WaRAConfig, adapted: Iterable[str], named: Iterable[str], modules: Iterable[str]
) -> None:
    """Warn of names and patterns that match nothing: PEFT does so where none matches, and of patterns for modules.

    Args:
        config: the config, resolved for the model.
        adapted: names of the modules and parameters that it adapts.
        named: names that its user has given as `target_modules` or `target_parameters`.
        modules: names of all modules of the model, adapted parameters included.
    """
    adapted = list(adapted)
    still_named = targeted_names(config) & set(named)
    matched = {name for name in still_named if any(f".{module}".endswith(f".{name}") for module in modules)}
    if still_named - matched:
        warnings.warn(
            f"Nothing in the model is called {first([repr(name) for name in sorted(still_named - matched)])}, which "
            "target_modules or target_parameters names; only the other names are adapted.",
            RuntimeWarning,
        )
    for field_name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field_name)
        unmatched = [
            pattern
            for pattern in sorted(patterns)
            if not pattern.startswith(BOTH)
            and not any(value_for(name, field_name, {pattern: True}, False) for name in adapted)
        ]
        if unmatched:
            warnings.warn(
                f"The following {field_name} keys did not match any targeted module and were ignored: {unmatched}.",
                RuntimeWarning,
            )


def targeted_names(config: WaRAConfig) -> set[str]:
    """The names, in place of a pattern, that a config has for modules and parameters."""
    modules = config.target_modules
    return {*(() if modules is None or isinstance(modules, str) else modules), *(config.target_parameters or ())}
