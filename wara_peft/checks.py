"""What is checked of an adapter and all its targets before the first module is replaced."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from .config import WaRAConfig
from .tiny import weight_hash
from .wavelet import max_useful_level, subbands


def check_targets(config: WaRAConfig, shapes: dict[str, tuple[int, int]]) -> None:
    """Check an adapter against all modules that it targets, and warn of what will work but badly.

    Args:
        config: the adapter's configuration.
        shapes: (out, in) lengths of the transformed axes, by module name.

    Raises:
        ValueError: a saved adapter was made for other shapes, a module is left without any rank, or with
            `form="tiny"` has more rank than singular values.
    """
    _check_shapes(config, shapes)
    _check_ranks(config, shapes)
    if config.form == "tiny":
        _check_tiny_ranks(config, shapes)
    if config.form != "grid":  # whose wavelet does not run along these axes
        axes = {name: dict(zip(("out", "in"), shape, strict=True)) for name, shape in shapes.items()}
        _warn_about_levels(config, axes)
        _warn_about_two_outputs(shapes)


def check_grids(config: WaRAConfig) -> None:
    """Warn of grids on which an adapter of `form="grid"` works but badly, as far as they are known."""
    sizes = {name: grid.size for name, grid in config.token_grids.items() if grid.size is not None}
    collapsed = [repr(name) for name, size in sizes.items() if size == (1, 1)]
    if collapsed:
        warnings.warn(
            f"A grid of a single patch, in module {first(collapsed)}, makes form='grid' a plain LoRA of the coarsest "
            "subband's rank: the other subbands are zero. Use form='subband'."
        )
    axes = {name: {"row": size[0], "column": size[1]} for name, size in sizes.items() if size != (1, 1)}
    _warn_about_levels(config, axes)


def check_base_weights(
    config: WaRAConfig, weights: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, int]]
) -> None:
    """Check the weights that a basis is made from, and record their hashes where the basis is not saved.

    Args:
        config: the adapter's configuration.
        weights: names of all target modules, each with its weight (m, n).
        shapes: (m, n) by module name.

    Raises:
        ValueError: a weight is not there or not finite, or it is not the one that a saved adapter belongs to.
    """
    hashes = {}
    for name, weight in weights:
        if weight.is_meta or tuple(weight.shape) != shapes[name]:
            raise ValueError(
                f"form='tiny' needs the weight of module {name!r}, which is on the meta device or in parts elsewhere. "
                "Add the adapter after the weights are loaded, and before they are offloaded or distributed."
            )
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"The weight of module {name!r} has values that are not finite, and no singular value decomposition "
                "for form='tiny'. Load the base model again, or leave the module out with `exclude_modules`."
            )
        if not config.save_basis:
            hashes[name] = weight_hash(weight)
    saved = (config.base_weight_hashes or {}) if config.is_of_saved_adapter else {}
    different = [repr(name) for name, value in hashes.items() if saved.get(name, value) != value]
    if different:
        raise ValueError(
            f"The saved adapter has form='tiny' with save_basis=False, and its basis comes from other base weights "
            f"than those of module {first(different)}. Load it on the base model it was trained on, in the same dtype "
            "and with the same quantization, or train it with save_basis=True."
        )
    config.base_weight_hashes = hashes or None


def check_adapter_name(adapter_name: str) -> None:
    if re.fullmatch(r"([AB]_)?level\d+|[ad][ad]\d+|weight", adapter_name):
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


def _check_tiny_ranks(config: WaRAConfig, shapes: dict[str, tuple[int, int]]) -> None:
    too_large = []
    for name, shape in shapes.items():
        ranks = config.ranks_of(name)
        for band in subbands(config.levels):
            largest = min(band.shape(*shape))
            if ranks[band.name] > largest:
                too_large.append(f"{name!r} ({band.name}: {ranks[band.name]}, at most {largest})")
    if too_large:
        raise ValueError(
            f"form='tiny' takes as many singular vectors as the rank, and there are fewer in {first(too_large)}. Give "
            "a smaller rank by `r`, `subband_ranks` or `rank_pattern`, or leave the module out with "
            "`exclude_modules`."
        )


def _warn_about_levels(config: WaRAConfig, axes: dict[str, dict[str, int]]) -> None:
    too_many = []
    for name, lengths in axes.items():
        for axis, length in lengths.items():
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
