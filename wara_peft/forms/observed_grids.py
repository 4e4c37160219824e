"""Grids of tokens, observed while a model runs: from outputs of its convolutions and from positions of patches.

The tokens of an image are the places of a feature map, row by row. A convolution makes this map just before: it embeds
patches, starts a stage, reduces keys and values, or is part of a UNet's residual block. Hooks note the size of each
map under its number of places. So a layer's number of tokens tells its grid, whatever the image's size and the stage.
Transformers that get patches in place of images are handed the patches' positions (`img_ids` in Flux and its kin).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

Layout = tuple[int, int, int]
"""Prefix tokens, rows and columns."""
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


class SeenGrids:
    """The latest layout for each number of tokens that was seen, or None if the tokens formed no grid.

    Numbers stand in the order in which they were last seen, and stay: gradient checkpointing runs a layer again in
    backward, but not its convolution. The layer then finds its grid, unless another grid of as many places has come
    between.
    """

    def __init__(self) -> None:
        self.layouts: dict[int, Layout | None] = {}
        self.by_positions = False  # whether hooks look at positions too

    def find(self, tokens: int, prefixes: Iterable[int]) -> Layout | None:
        """The latest layout that fits a sequence whose patches come after one of these numbers of prefix tokens."""
        fitting = {tokens - prefix: prefix for prefix in prefixes}
        for number in reversed(list(self.layouts)):
            layout = self.layouts[number]
            if number in fitting and layout is not None:
                before, rows, columns = layout
                return before + fitting[number], rows, columns
        return None

    def _see(self, tokens: int, layout: Layout) -> None:
        """Note a layout under its number of tokens; note None if grid and prefix have another number of places."""
        prefix, rows, columns = layout
        self.layouts.pop(tokens, None)  # so that it is the last
        self.layouts[tokens] = layout if prefix + rows * columns == tokens else None

    def start(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model. It forgets all grids in a graph of torch.compile, which is made for one grid.

        With older grids in sight, a graph would be compiled again after each new one.
        """
        if torch.compiler.is_compiling():
            self.layouts = {}

    def see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a convolution whose output is (batch, channels, ..., rows, columns)."""
        if isinstance(output, Tensor):
            # `index` makes lengths plain ints, which torch.compile takes as constants of a graph.
            *frames, rows, columns = (index(length) for length in output.shape[2:])
            self._see(math.prod(frames) * rows * columns, (0, rows, columns))

    def see_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of a transformer that takes `img_ids`, (tokens, 3 or more), with row and column in 1 and 2.

        In its blocks of joint tokens the text, with positions `txt_ids`, comes before the image.
        """
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        positions, text = given.get("img_ids"), given.get("txt_ids")
        if positions is None:
            return
        positions = positions[0] if positions.ndim == 3 else positions
        tokens = len(positions)
        rows, columns = (int(length) + 1 for length in (positions.amax(0) - positions.amin(0))[1:3].tolist())
        self._see(tokens, (0, rows, columns))
        if text is not None:
            prefix = text.shape[-2]
            self._see(prefix + tokens, (prefix, rows, columns))


def observe_grids(model: nn.Module, by_positions: bool = True) -> SeenGrids | None:
    """Register hooks that observe the grids of a model, and return the `SeenGrids` that they fill.

    A model that is observed already gets no second hooks.

    Args:
        model: the model.
        by_positions: whether to observe positions too. torch.compile cannot trace these hooks.

    Returns:
        The grids; None if the model has no convolution and is handed no positions.
    """
    at_root = next(iter(_watchers(model).values()), None)
    if at_root is not None and (at_root.by_positions or not by_positions):  # all hooks are there
        return at_root
    watched = {
        module: _watchers(module)
        for module in model.modules()
        if isinstance(module, _CONVOLUTIONS) or (by_positions and _is_handed_positions(module))
    }
    if not watched:
        return None
    seen = next((seen for watchers in watched.values() for seen in watchers.values()), None) or SeenGrids()
    if at_root is None:
        model.register_forward_pre_hook(seen.start)
    for module, watchers in watched.items():
        if not isinstance(module, _CONVOLUTIONS):
            if not seen.by_positions:
                module.register_forward_pre_hook(seen.see_positions, with_kwargs=True)
        elif not watchers:
            module.register_forward_hook(seen.see_output)
    seen.by_positions = seen.by_positions or by_positions
    return seen


def stop_observing(model: nn.Module) -> None:
    """Remove the hooks of `observe_grids`."""
    for module in model.modules():
        for key in _watchers(module):
            # No handles were kept, so the hooks are taken out of the dictionaries that PyTorch has them in.
            module._forward_hooks.pop(key, None)
            module._forward_pre_hooks.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_handed_positions(module: nn.Module) -> bool:
    """Whether a module is a transformer of diffusers that gets patches with their positions."""
    of_diffusers = isinstance(getattr(module, "config", None), Mapping)
    return of_diffusers and "img_ids" in inspect.signature(type(module).forward).parameters


def _watchers(module: nn.Module) -> dict[int, SeenGrids]:
    """The `SeenGrids` that hooks of a module fill, by the hook's key. `__self__` is the owner of a bound method."""
    hooks = {**module._forward_hooks, **module._forward_pre_hooks}
    owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
    return {key: owner for key, owner in owners.items() if isinstance(owner, SeenGrids)}
