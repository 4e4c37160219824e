"""Checks on the targets of an adapter of any form, made before the first module is replaced."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..base_layers.embeddings import embeddings
from ..base_layers.own_forward import reason_against_adapting
from ..base_layers.refusals import Refusal, exclude_modules_for, reasons_in_words
from ..config import WaRAConfig
from ..config_fields.from_lora import BOTH
from ..config_fields.name_patterns import NEGATED, check_in_time, matches, suffix_matches
from ..messages import first_few


def check_ranks(config: WaRAConfig, names: Collection[str]) -> None:
    """Refuse a config that gives one of the modules no rank at all, or has a pattern whose matching would not end.

    Raises:
        ValueError: the config does, or has one.
    """
    for field_name in ("rank_pattern", "alpha_pattern"):
        check_in_time(field_name, getattr(config, field_name), names)
    empty = [repr(name) for name in names if not any(config.ranks_of(name).values())]
    if empty:
        raise ValueError(
            f"rank_pattern leaves every subband out in module {first_few(empty)}. Give at least one a rank, or leave "
            "the module out with `exclude_modules`."
        )


def check_factors(targets: Mapping[str, nn.Module]) -> None:
    """Refuse to adapt both a factorised layer as a whole and one of its factors.

    Args:
        targets: base layers that are to be adapted, by name.

    Raises:
        ValueError: a factor of a target is a target too, or has an adapter already.
    """
    for name, base in targets.items():
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


def names_in_full(config: WaRAConfig) -> tuple[str, ...]:
    """Give the names of modules that train in full or in some rows; PEFT matches them with ends of modules' names."""
    indices = config.trainable_token_indices
    return (*(config.modules_to_save or ()), *(indices if isinstance(indices, dict) else ()))


def check_in_full(config: WaRAConfig, model: nn.Module, targets: Iterable[str]) -> None:
    """Refuse to adapt a module that is to train in full, or some of whose rows (tokens) are.

    PEFT itself compares only the names in the config, and so does not see modules inside of others.

    Args:
        config: the config.
        model: the model.
        targets: names of the modules and parameters that are to be adapted.

    Raises:
        ValueError: a module that is to train in full is a target, is part of a target, or contains one; or two names
            in `trainable_token_indices` mean the same layer.
    """
    # A layer that is tied to another one trains in full, or is adapted, together with it.
    ends = (*names_in_full(config), *(config.modules_to_tie or ()))
    targets = [*targets, *(config.target_modules_to_tie or ())]
    embedding = embeddings(model)[0] if isinstance(config.trainable_token_indices, list) else None
    indices = config.trainable_token_indices
    for name, module in model.named_modules():
        tokens = (
            {end: rows for end, rows in indices.items() if name.endswith(end)} if isinstance(indices, dict) else {}
        )
        if len({tuple(rows) for rows in tokens.values()}) > 1:
            raise ValueError(
                f"trainable_token_indices has other tokens for {' and '.join(map(repr, tokens))}, which both mean "
                f"{name!r}, and PEFT does not keep their order. Name each layer once, by a name that no other ends in."
            )
        if not name.endswith(ends) and (embedding is None or module is not embedding):
            continue
        both = [target for target in targets if f"{target}.".startswith(f"{name}.") or name.startswith(f"{target}.")]
        if both:
            raise ValueError(
                f"{name!r} is to train in full or has rows of tokens that do, by `modules_to_save` or "
                f"`trainable_token_indices`, and {first_few(list(map(repr, both)))} is to be adapted. Do one of the "
                "two: take it out of one of these lists, or leave the target out with `exclude_modules`."
            )


def reasons_of_other_forwards(targets: Mapping[str, nn.Module]) -> dict[str, Refusal]:
    """Find the targets whose forward does not just multiply by the weight; give by name why they cannot be adapted."""
    found = {}
    for name, base in targets.items():
        reason = reason_against_adapting(base)
        if reason is not None:
            found[name] = Refusal(
                f"Target module {{}}, a {type(base).__name__}, cannot be adapted: {reason}. `modules_to_save` trains "
                "it in full."
            )
    return found


def is_all_linear(config: WaRAConfig) -> bool:
    """Say whether a config asks for "all-linear", and so names no layer itself."""
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def leave_out_refused(
    config: WaRAConfig, refusals: Mapping[str, Refusal], targets: list[str], names: list[str]
) -> None:
    """Resolve "all-linear" to the modules that can be adapted, and warn of those that cannot.

    If no module can be adapted, the config stays: the refusal that follows then gives the reasons as an error.

    Args:
        config: the config, which is changed in place.
        refusals: why modules and bare parameters cannot be adapted, by name.
        targets: names of all modules that the config targets now.
        names: names of all modules of the model.
    """
    kept = [name for name in targets if name not in refusals]
    if not kept or not refusals:
        return
    modules = [name for name in refusals if name in names]
    excluded = exclude_modules_for(modules, kept, config.exclude_modules)
    without_warning = f" `exclude_modules={excluded!r}` leaves modules out without a warning." if modules else ""
    warnings.warn(
        f"target_modules='all-linear' leaves {len(refusals)} of {len(refusals) + len(kept)} layers out. "
        f"{reasons_in_words(refusals)}{without_warning}"
    )
    if len(kept) < len(targets):
        config.target_modules = set(kept)  # type: ignore[assignment]  # PEFT keeps a set
        config.exclude_modules = suffix_matches(kept, names) or config.exclude_modules


def warn_of_unmatched(
    config: WaRAConfig, adapted: Iterable[str], named: Iterable[str], modules: Iterable[str]
) -> None:
    """Warn of every name and pattern that matches nothing.

    PEFT itself warns of names only if none of them matches, and does not compare patterns with adapted parameters.

    Args:
        config: the config, resolved for the model.
        adapted: names of the modules and parameters that it adapts.
        named: names that the user has given as `target_modules` or `target_parameters`.
        modules: names of all modules of the model, adapted parameters included.
    """
    adapted = list(adapted)
    still_named = targeted_names(config) & set(named)
    matched = {name for name in still_named if any(f".{module}".endswith(f".{name}") for module in modules)}
    if still_named - matched:
        warnings.warn(
            f"Nothing in the model is called {first_few([repr(name) for name in sorted(still_named - matched)])}, "
            "which target_modules or target_parameters names; only the other names are adapted.",
            RuntimeWarning,
        )
    for field_name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field_name)
        unmatched = [
            pattern
            for pattern in sorted(patterns)
            if not pattern.startswith((BOTH, NEGATED))
            and not any(matches(pattern, name, field_name) for name in adapted)
        ]
        if unmatched:
            warnings.warn(
                f"The following {field_name} keys did not match any targeted module and were ignored: {unmatched}.",
                RuntimeWarning,
            )


def targeted_names(config: WaRAConfig) -> set[str]:
    """Give the names of target modules and parameters in a config; a pattern or "all-linear" is none."""
    modules = config.target_modules
    return {*(() if modules is None or isinstance(modules, str) else modules), *(config.target_parameters or ())}
