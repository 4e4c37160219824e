"""What is checked of an adapter and all its targets before the first module is replaced."""

from __future__ import annotations

import re
import warnings

from .config import WaRAConfig
from .wavelet import max_useful_level


def check_targets(config: WaRAConfig, shapes: dict[str, tuple[int, int]]) -> None:
    """Check an adapter against all modules that it targets, and warn of what will work but badly.

    Args:
        config: the adapter's configuration.
        shapes: (out, in) lengths of the transformed axes, by module name.

    Raises:
        ValueError: a saved adapter was made for other shapes, or a module is left without any rank.
    """
    _check_shapes(config, shapes)
    _check_ranks(config, shapes)
    _warn_about_levels(config, shapes)
    _warn_about_two_outputs(shapes)


def check_adapter_name(adapter_name: str) -> None:
    if re.fullmatch(r"level\d+", adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a parameter of WaRA adapters, and saving would write "
            "an empty file. Choose another name."
        )


def _check_shapes(config: WaRAConfig, shapes: dict[str, tuple[int, int]]) -> None:
    """A saved adapter must meet modules of the shapes that it was trained on."""
    saved_shapes = config._saved_shapes if config.module_shapes is not None else None
    saved = {name: (entry[1], entry[2]) for name, entry in (saved_shapes or {}).items()}
    different = [
        f"{name!r} (saved {saved[name]}, here {shape})"
        for name, shape in shapes.items()
        if saved.get(name, shape) != shape
    ]
    if different:
        raise ValueError(
            f"The saved adapter was made for modules of other (out, in) shapes: {first(different)}. Load it on the "
            "base model it was trained on (with its embeddings resized as they were then); to use its config for a "
            "new adapter, set `module_shapes=None` in it first."
        )
    missing = [repr(name) for name in saved if name not in shapes]
    if missing:
        warnings.warn(
            f"The saved adapter also adapts {first(missing)}, which this model does not have or the config does not "
            "target; that part of it is ignored."
        )


def _check_ranks(config: WaRAConfig, shapes: dict[str, tuple[int, int]]) -> None:
    empty = [repr(name) for name in shapes if not any(config.ranks_of(name).values())]
    if empty:
        raise ValueError(
            f"rank_pattern leaves every subband out in module {first(empty)}. Give at least one a rank, or leave the "
            "module out with `exclude_modules`."
        )


def _warn_about_levels(config: WaRAConfig, shapes: dict[str, tuple[int, int]]) -> None:
    too_many = []
    for name, shape in shapes.items():
        for axis, length in zip(("out", "in"), shape, strict=True):
            useful = max_useful_level(config.wavelet, length)
            if config.levels > useful:
                too_many.append(f"{name!r} ({axis} axis of length {length}: at most {useful})")
    if too_many:
        warnings.warn(
            f"levels={config.levels} is more than is useful for wavelet={config.wavelet!r} in {first(too_many)}: "
            "filters wrap around the axis. The transform stays exact, but coarse subbands carry little more."
        )


def _warn_about_two_outputs(shapes: dict[str, tuple[int, int]]) -> None:
    heads = [repr(name) for name, (out, _) in shapes.items() if out == 2]
    if heads:
        warnings.warn(
            f"Module {first(heads)} has two outputs. The gradients of two logits cancel, so the approximation band "
            "of its out axis gets none and half of the adapter does not learn. If it is a classification head, train "
            "it in full: put it in `modules_to_save`."
        )


def first(items: list[str], count: int = 3) -> str:
    """The first few items for a message, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
