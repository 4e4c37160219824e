"""Grids seen while a model runs: the shapes of what its convolutions put out, and the positions that it is handed.

Tokens of images are the places of a feature map, row by row, which a convolution has made just before: the embedding
of patches, a stage's embedding, the reduction of keys and values, a UNet's residual block. So a layer's number of
tokens tells its grid, whatever the image's size and the stage. Transformers that get patches instead of images are
handed their positions (`img_ids` in Flux and its kin).
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
    """Layouts of token sequences by their number of tokens: of each number the latest, or None where it is no grid.

    Numbers are in the order in which they were last seen, and never forgotten: a checkpointed layer runs again when
    its convolution does not. It then finds its grid, unless the model has meanwhile seen another of as many places.
    """

    def __init__(self) -> None:
        self.layouts: dict[int, Layout | None] = {}
        self.by_positions = False  # whether transformers that are handed positions are watched too

    def find(self, tokens: int, prefixes: Iterable[int]) -> Layout | None:
        """The layout of a sequence, its patches after one of these numbers of prefix tokens: the latest that fits."""
        fitting = {tokens - prefix: prefix for prefix in prefixes}
        for number in reversed(list(self.layouts)):
            layout = self.layouts[number]
            if number in fitting and layout is not None:
                before, rows, columns = layout
                return before + fitting[number], rows, columns
        return None

    def _see(self, tokens: int, layout: Layout) -> None:
        """Note the layout of that number of tokens, if its grid has as many places as tokens come after the prefix."""
        prefix, rows, columns = layout
        self.layouts.pop(tokens, None)  # so that it is the last
        self.layouts[tokens] = layout if prefix + rows * columns == tokens else None

    def start(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model: a graph of torch.compile that is for one grid must not look at older ones."""
        if torch.compiler.is_compiling():
            self.layouts = {}

    def see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a convolution whose output is (batch, channels, ..., rows, columns)."""
        if isinstance(output, Tensor):
            # index: to torch.compile lengths are constants of a graph
            *frames, rows, columns = (index(length) for length in output.shape[2:])
            self._see(math.prod(frames) * rows * columns, (0, rows, columns))

    def see_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of a transformer that takes `img_ids`, (tokens, 3 or more): something, row, column, …

        In its blocks of joint tokens the text of `txt_ids` comes before the image.
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
    """Watch a model from the first call on, and return what is seen; None where nothing would tell.

    Args:
        model: the model.
        by_positions: whether to watch transformers that are handed positions; torch.compile cannot trace that.
    """
    at_root = next(iter(_watchers(model).values()), None)
    if at_root is not None and (at_root.by_positions or not by_positions):  # so all that counts is watched
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
    """Take out the hooks of `observe_grids`."""
    for module in model.modules():
        for key in _watchers(module):
            module._forward_hooks.pop(key, None)
            module._forward_pre_hooks.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_handed_positions(module: nn.Module) -> bool:
    """Whether it is a transformer of diffusers that gets patches with their positions."""
    of_diffusers = isinstance(getattr(module, "config", None), Mapping)
    return of_diffusers and "img_ids" in inspect.signature(type(module).forward).parameters


def _watchers(module: nn.Module) -> dict[int, SeenGrids]:
    """Who sees with hooks of a module, by the hook's key."""
    hooks = {**module._forward_hooks, **module._forward_pre_hooks}
    owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
    return {key: owner for key, owner in owners.items() if isinstance(owner, SeenGrids)}
