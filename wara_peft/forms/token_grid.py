"""Where the tokens of a model's layers lie: grid size and prefix tokens, read off its config and its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .base import Settings

PREFIX_PARAMETERS = (
    "cls_token",
    "class_token",
    "class_embedding",
    "distillation_token",
    "dist_token",
    "register_tokens",
    "reg_token",
)
"""Names under which vision models keep the embeddings of tokens that come before the patches."""
SHUFFLING = ("vit_mae",)
"""Types of models whose encoder sees patches in random order."""


@dataclass(frozen=True)
class TokenGrid:
    """What is known of a layer's tokens before it sees any.

    Args:
        size: rows and columns of patches at the image size that the model is made for, or None.
        prefix: number of tokens before the patches, or None.
        fixed: no other size is right, because the user has named this one.
    """

    size: tuple[int, int] | None = None
    prefix: int | None = None
    fixed: bool = False

    def split(self, tokens: int) -> tuple[int, int, int] | None:
        """Prefix tokens, rows and columns of a sequence of that many tokens, or None if it fits no grid.

        The known size goes first; images of other sizes have square grids. Where the prefix is not known it is what a
        fixed size leaves, or else none or one.
        """
        if self.fixed and self.size is not None and self.prefix is None:
            prefixes: tuple[int, ...] = (tokens - math.prod(self.size),)
        else:
            prefixes = (0, 1) if self.prefix is None else (self.prefix,)
        for prefix in prefixes:
            if prefix >= 0 and self.size is not None and tokens - prefix == math.prod(self.size):
                return prefix, *self.size
        for prefix in prefixes:
            side = math.isqrt(max(tokens - prefix, 0))
            if not self.fixed and side and side * side == tokens - prefix:
                return prefix, side, side
        return None


def token_grid(model: nn.Module, module_name: str, config: Settings) -> TokenGrid:
    """What is known of the tokens of one module.

    The size comes from `grid_size`, or from `image_size` and `patch_size` of the nearest transformers config around
    the module; the prefix from `num_prefix_tokens`, or from class, distillation and register tokens among the
    parameters of that config's model.

    Raises:
        ValueError: the module is part of a causal or other language model, or of a model whose layers see windows or
            shuffled patches.
    """
    around = [module for module in _around(model, module_name) if not isinstance(module, nn.ModuleList)]
    model_config = next((found for module in around if (found := _config_of(module)) is not None), None)
    _refuse(around, model_config, module_name)
    scope = [module for module in around if model_config is None or _config_of(module) is model_config]
    prefix = config.num_prefix_tokens
    if prefix is None:
        prefix = _prefix_tokens(scope[-1] if scope else model)
    if config.grid_size is not None:
        return TokenGrid(config.grid_size, prefix, fixed=True)
    return TokenGrid(_size(model_config), prefix)


def _around(model: nn.Module, module_name: str) -> Iterator[nn.Module]:
    """The modules that contain the one of that name, nearest first, the model itself last."""
    parts = module_name.split(".")
    for count in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:count]))


def _config_of(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "model_type") else None


def _refuse(around: list[nn.Module], config: Any, module_name: str) -> None:
    where = f"form='grid' cannot adapt module {module_name!r}"
    causal = [
        type(module).__name__
        for module in around
        if getattr(module, "is_causal", False) is True or "CausalLM" in type(module).__name__
    ]
    language = hasattr(config, "vocab_size") and not hasattr(config, "image_size")
    if causal or getattr(config, "is_decoder", False) or language:
        name = causal[0] if causal else config.model_type
        raise ValueError(
            f"{where}, which is part of a language model ({name}): its tokens lie on no grid, and in a causal model a "
            "wavelet over time would leak the future. Use form='subband', or leave the module out with "
            "`exclude_modules`."
        )
    if getattr(config, "window_size", 0):
        raise ValueError(
            f"{where} of a {config.model_type} model: its layers see windows of patches, not their grid. Use "
            "form='subband'."
        )
    if getattr(config, "model_type", None) in SHUFFLING:
        raise ValueError(
            f"{where} of a {config.model_type} model: it shuffles its patches. Use form='subband', or load the "
            "encoder's weights into the model that it is made for (vit)."
        )


def _size(config: Any) -> tuple[int, int] | None:
    image, patch = _pair(getattr(config, "image_size", None)), _pair(getattr(config, "patch_size", None))
    return None if image is None or patch is None else (image[0] // patch[0], image[1] // patch[1])


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return value[0], value[1]
    return None


def _prefix_tokens(model: nn.Module) -> int | None:
    """Number of prefix tokens that the model has embeddings for, or None where it has none by a known name."""
    found = {
        name.rpartition(".")[2]: parameter.shape[1] if parameter.ndim == 3 else 1
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in PREFIX_PARAMETERS
    }
    return sum(found.values()) or None
