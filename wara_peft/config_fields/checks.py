"""Checks the values of a `WaRAConfig` when it is made, so that errors come before a model is touched."""

from __future__ import annotations

import math
import warnings
from typing import Any

from ..arguments import check_whole_number, short_form
from ..forms import FORMS
from ..wavelet import filters
from .name_patterns import check_pattern

MAX_LEVELS = 64
"""The most levels. No axis is long enough for more, and a downloaded config may ask for any number."""
MAX_RANK = 2**16
"""The largest rank of a subband, for the same reason."""
MAX_LENGTH = 2**31
"""The largest length of a module's axis, for the same reason."""


def check_config(config: Any) -> None:
    """Refuse values that have no meaning, singly or together; `check_types` has checked their types before.

    Raises:
        ValueError: a value is out of range, or fields contradict each other.
    """
    _check_values(config)
    _check_form(config)
    _check_ranks(config)
    _check_targets(config)
    _check_shapes(config)
    _warn_of_loras_alpha(config)


def _check_values(config: Any) -> None:
    filters(config.wavelet)  # raises an error for a name that is no orthogonal wavelet
    check_whole_number("levels", config.levels, 1, MAX_LEVELS)
    if not 0.0 <= config.wara_dropout < 1.0:
        raise ValueError(f"wara_dropout={config.wara_dropout!r} must be a probability, at least 0 and less than 1.")
    _check_finite("wara_alpha", config.wara_alpha or 0.0)
    for pattern, alpha in config.alpha_pattern.items():
        where = f"alpha_pattern[{pattern!r}]"
        check_pattern(where, pattern)
        _check_finite(where, alpha)


def _check_form(config: Any) -> None:
    for other in FORMS.values():
        for name in other.own_fields if other is not config.form_object else ():
            if getattr(config, name) != type(config).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} has no meaning with form={config.form!r}, only with "
                    f"{other.name!r}."
                )
    if not isinstance(config.init_weights, bool) and config.init_weights not in config.form_object.initialisations:
        able = [repr(form.name) for form in FORMS.values() if config.init_weights in form.initialisations]
        raise ValueError(
            f"init_weights={config.init_weights!r} is for form={' or '.join(able)}; form={config.form!r} takes True "
            "or False."
        )
    config.form_object.check(config)


def _check_ranks(config: Any) -> None:
    check_whole_number("r", config.r, 1, MAX_RANK)
    single_pair = config.form_object.single_pair(config)
    if single_pair and config.subband_ranks is not None:
        raise ValueError(f"{single_pair} has one pair for its subbands: set `r`, and leave subband_ranks None.")
    _check_subband_ranks(config, "subband_ranks", config.subband_ranks or {})
    for pattern, rank in config.rank_pattern.items():
        where = f"rank_pattern[{pattern!r}]"
        check_pattern(where, pattern)
        if isinstance(rank, int):
            check_whole_number(where, rank, 1, MAX_RANK)
        elif single_pair:
            raise ValueError(f"{where}={rank!r} must be an int with {single_pair}, which has a single pair.")
        else:
            _check_subband_ranks(config, where, rank)
    if config.total_rank == 0 and not config.rank_pattern:
        raise ValueError(
            f"subband_ranks={config.subband_ranks!r} leaves every subband out, and nothing would be trained. "
            "Give at least one subband a rank."
        )


def _check_subband_ranks(config: Any, where: str, ranks: dict[str, int]) -> None:
    names = [band.name for band in config.form_object.subbands(config)]
    for name, rank in ranks.items():
        if name not in names:
            raise ValueError(
                f"{where} names the subband {name!r}; with form={config.form!r} and levels={config.levels} there are "
                f"{', '.join(names)}."
            )
        check_whole_number(f"{where}[{name!r}]", rank, 0, MAX_RANK)


def _check_targets(config: Any) -> None:
    by_regex = isinstance(config.target_modules, str)
    if by_regex and config.layers_to_transform is not None:
        raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
    if by_regex and config.layers_pattern is not None:
        raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def _check_shapes(config: Any) -> None:
    for name, entry in (config.module_shapes or {}).items():
        kind, *sizes = entry or [None]
        # Sizes are at least 1, but for the last two of a parameter: its number of experts and its position may be 0.
        least = zip(sizes, (1, 1, 1) if len(sizes) < 4 else (1, 1, 0, 0), strict=False)
        whole = all(
            isinstance(size, int) and not isinstance(size, bool) and low <= size <= MAX_LENGTH for size, low in least
        )
        if not isinstance(kind, str) or len(sizes) not in (2, 3, 4) or not whole:
            raise ValueError(f"module_shapes has {entry!r} for {name!r}; [kind, out, in] was expected.")


def _warn_of_loras_alpha(config: Any) -> None:
    """Warn if r and alpha look copied from a LoRA, where alpha is r or 2r, and make a scaling below 1 here."""
    rank, alpha = config.total_rank, config.wara_alpha
    # The user of a saved adapter did not choose its numbers, and must not change them.
    saved = config.module_shapes is not None or config.inference_mode
    own_rank = config.r != type(config).__dataclass_fields__["r"].default
    if saved or config.use_rslora or config.form != "subband" or not own_rank or alpha not in (config.r, 2 * config.r):
        return
    if alpha < rank:
        warnings.warn(
            f"wara_alpha={alpha:g} with r={config.r} scales by {alpha / rank:g}, for R = {rank}. A LoRA of these "
            f"numbers scales by {alpha / config.r:g}; WaRAConfig.from_lora(LoraConfig(r={config.r}, "
            f"lora_alpha={alpha:g})) keeps its scaling and its number of parameters."
        )


def _check_finite(name: str, value: float) -> None:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int that is too large for a float
        finite = False
    if not finite:
        raise ValueError(f"{name}={short_form(value)} must be finite, as a float is.")
