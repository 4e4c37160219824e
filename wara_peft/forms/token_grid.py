"""Grid size and prefix tokens of a model's layers, from its config, its parameters and the grids seen as it runs.

The tokens of a layer are prefix tokens, such as a class token, and then the patches of a grid, row by row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..base_layers.refusals import Refusal
from ..messages import first_few
from .base import Settings
from .observed_grids import Layout, SeenGrids, observe_grids

PREFIX_PARAMETERS = (
    "cls_token",
    "class_token",
    "class_embedding",
    "distillation_token",
    "dist_token",
    "register_tokens",
    "reg_token",
)
"""Names of the parameters in which vision models keep the embeddings of prefix tokens."""
OTHER_ORDERS = {
    "convnext": "its linear layers see feature maps of four dimensions. Use form='subband'.",
    "convnextv2": "its linear layers see feature maps of four dimensions. Use form='subband'.",
    "hiera": "it orders its patches by the windows that it pools. Use form='subband'.",
    "llama4_vision_model": "its class token comes after the patches. Use form='subband'.",
    "levit": "it halves its grids without a convolution, from which a grid is known. Use form='subband'.",
    "mobilevit": "its layers see every second patch of a row. Use form='subband'.",
    "vilt": "text comes before the patches in all of its layers. Use form='subband'.",
    "yolos": "its detection tokens come after the patches. Use form='subband'.",
    "vit_mae": "it shuffles its patches. Use form='subband', or load the encoder's weights into the model that it is "
    "made for (vit).",
}
"""Types of models whose tokens are in another order than a grid's, or whose grid cannot be found, with the reason."""
WITHOUT_PATCHES = re.compile(
    r"add_[qkv]_proj|to_add_out|encoder_hid_proj|.*context.*|caption_.*|(text|txt)_.*", re.IGNORECASE
)
"""Names that diffusers' models give to modules which see only text."""


_OF_CONDITIONS = ("diffusers.models.embeddings", "diffusers.models.normalization")
"""Files of diffusers whose modules see steps, classes or pooled text, except those that embed patches."""
_CONDITIONED = ("time_emb_proj", "proj_out_1")
"""Names of layers in other files of diffusers that see steps, classes or pooled text."""
_POOLS = re.compile(r"(Pooler|PoolerLayer|PoolingHead)$")
"""Names of classes of transformers that make one vector of all tokens."""
_CLASSIFIES = re.compile(r"For(Image|Audio|Video)Classification")
"""Names of classes of transformers whose layers outside of the base model see one vector of all tokens."""


@dataclass(frozen=True)
class TokenGrid:
    """All that is known about the tokens of a layer.

    Args:
        size: rows and columns of patches at the image size that the model is made for, or None if unknown.
        prefix: number of tokens before the patches, or None if unknown.
        fixed: whether the user has set `size`. Then no other size is right, and `seen` can only contradict it.
        square: whether patches of another number than `size` has may be taken for a square.
        seen: the grids that are seen while the model runs, or None if no module of it tells a grid.
    """

    size: tuple[int, int] | None = None
    prefix: int | None = None
    fixed: bool = False
    square: bool = True
    seen: SeenGrids | None = None

    def split(self, tokens: int) -> Layout | None:
        """Prefix tokens, rows and columns of a sequence of that many tokens, or None if it fits no grid.

        Grids that were seen count first. If none was seen, the known size is tried, and then a square. If the prefix
        is not known, it is the number of tokens that a fixed size leaves over; with no fixed size 0 and 1 are tried.

        A fixed size fits no sequence for which the model was seen to make another grid of as many patches.
        """
        if self._tells is not None and not self.fixed:
            return self._tells.find(tokens, (0, 1) if self.prefix is None else (self.prefix, 0))
        if self.fixed and self.size is not None and self.prefix is None:
            prefixes: tuple[int, ...] = (tokens - math.prod(self.size),)
        else:
            prefixes = (0, 1) if self.prefix is None else (self.prefix,)
        for prefix in prefixes:
            if prefix >= 0 and self.size is not None and tokens - prefix == math.prod(self.size):
                return None if self.contradicted_by(prefix, tokens) else (prefix, *self.size)
        for prefix in prefixes:
            side = math.isqrt(max(tokens - prefix, 0))
            if self.square and not self.fixed and side and side * side == tokens - prefix:
                return prefix, side, side
        return None

    def contradicted_by(self, prefix: int, tokens: int) -> tuple[int, ...] | None:
        """The rows and columns that were seen for this number of tokens, if they are not those of `size`."""
        found = None if self._tells is None else self._tells.find(tokens, (prefix,))
        return None if found is None or found[1:] == self.size else found[1:]

    @property
    def _tells(self) -> SeenGrids | None:
        """The grids that were seen, or None if none was seen so far."""
        return self.seen if self.seen is not None and self.seen.layouts else None

    def __str__(self) -> str:
        """The layouts that fit, in words for messages."""
        before = "0 or 1" if self.prefix is None else str(self.prefix)
        known = [] if self.size is None else ["{} x {}".format(*self.size)]
        if self.square and not self.fixed:
            known.append("a square")
        if self._tells is not None and not self.fixed:
            seen = [layout for layout in self._tells.layouts.values() if layout is not None]
            known = [f"{rows} x {columns}" for _, rows, columns in reversed(seen)]
        return f"{first_few(known) or 'a grid'} of patches after {before} prefix tokens"


def token_grid(model: nn.Module, module_name: str, config: Settings) -> TokenGrid:
    """All that is known about the tokens of one module. From now on hooks observe the model's grids too.

    The size comes from `grid_size`. Without that it comes from the convolutions and positions while the model runs.
    Before the model has run it comes from the sizes of image and patch in the nearest config around the module. In a
    model without a config, patches are taken for a square.

    The prefix comes from `num_prefix_tokens`. Without that the class, distillation and register tokens among the
    parameters of the model that has this config are counted.
    """
    model_config = _surroundings(model, module_name)[1]
    prefix = config.num_prefix_tokens
    if prefix is None:
        prefix = _counted_prefix(model, module_name)
    if config.grid_size is not None:
        return TokenGrid(config.grid_size, prefix, fixed=True, seen=observe_grids(model, by_positions=False))
    return TokenGrid(_size(model_config), prefix, square=model_config is None, seen=observe_grids(model))


def known_size(model: nn.Module, module_name: str, config: Settings) -> tuple[int, int] | None:
    """Rows and columns of a module's patches if they are known before the model runs, otherwise None."""
    return config.grid_size or _size(_surroundings(model, module_name)[1])


def _counted_prefix(model: nn.Module, module_name: str) -> int | None:
    """Number of prefix tokens in the model that has the nearest config around a module, by its parameters."""
    around, model_config = _surroundings(model, module_name)
    scope = [module for module in around if model_config is None or _config_of(module) is model_config]
    return _prefix_tokens(scope[-1] if scope else model)


def check_prefix(model: nn.Module, module_names: Iterable[str], config: Settings) -> None:
    """Refuse a `num_prefix_tokens` that is not the number which a model of transformers has before its patches.

    Raises:
        ValueError: one of these modules is part of a model with another number.
    """
    given = config.num_prefix_tokens
    for name in module_names if given is not None else ():
        model_config = _surroundings(model, name)[1]
        counted = _counted_prefix(model, name) or 0
        # A model whose config has no size of images may get its patches, and tokens before them, from anywhere.
        if hasattr(model_config, "model_type") and _size(model_config) is not None and counted != given:
            raise ValueError(
                f"num_prefix_tokens={given} is not what module {name!r} sees: its {model_config.model_type} model has "
                f"{counted} class, distillation and register tokens before the patches. Leave num_prefix_tokens out."
            )


def reasons_off_grid(model: nn.Module, module_names: Iterable[str]) -> dict[str, Refusal]:
    """The modules whose tokens lie on no grid, by name, each with the reason.

    Such a module may be part of a language model, or of a model whose layers see windows or patches in another order.
    Or it sees only text, or no tokens at all.
    """
    found = {}
    for name in module_names:
        around, model_config = _surroundings(model, name)
        sentence = _reason_of_model(around, model_config) or _reason_of_module(model, name, around, model_config)
        if sentence is not None:
            found[name] = Refusal(sentence)
    return found


def _reason_of_module(model: nn.Module, module_name: str, around: list[nn.Module], config: Any) -> str | None:
    """Why a module sees no patches though its model has some; None if it sees them."""
    of_transformers = hasattr(config, "model_type")
    if not of_transformers and (_sees_text_alone(around[0], module_name) or _sees_conditions(around, module_name)):
        return (
            "form='grid' cannot adapt module {}, which sees only text or conditions: these lie on no grid. A second "
            "adapter of form='subband' can adapt them."
        )
    if _sees_whole_images(model, module_name):
        return (
            "form='grid' cannot adapt module {}, which sees one vector for a whole image: that lies on no grid. "
            "`modules_to_save` trains a head in full."
        )
    return None


def _sees_text_alone(parent: nn.Module, module_name: str) -> bool:
    """Whether a module of a diffusion model sees no patch: keys and values of cross-attention, or a stream of text."""
    parts = module_name.split(".")
    if getattr(parent, "is_cross_attention", False) is True and parts[-1] in ("to_k", "to_v"):
        return True
    return any(WITHOUT_PATCHES.fullmatch(part) for part in parts)


def _sees_conditions(around: list[nn.Module], module_name: str) -> bool:
    """Whether a module of a diffusion model sees embeddings of steps, classes or pooled text."""
    kinds = [type(module) for module in around]
    embeds = any(kind.__module__ in _OF_CONDITIONS and "PatchEmbed" not in kind.__name__ for kind in kinds)
    return embeds or module_name.rpartition(".")[2] in _CONDITIONED


def _sees_whole_images(model: nn.Module, module_name: str) -> bool:
    """Whether a module sees one vector for all patches, as a pooler's and a head's layers do."""
    parts = module_name.split(".")
    module = model.get_submodule(module_name)
    for depth, child in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:depth]))
        kind = type(parent).__name__
        is_classifier = isinstance(parent, PreTrainedModel) and _CLASSIFIES.search(kind) is not None
        heads: Any = getattr(parent, "get_classifier", tuple)()  # models of timm have such a function
        if any(module in head.modules() for head in (heads if isinstance(heads, tuple) else (heads,))):
            return True
        if _POOLS.search(kind) or (is_classifier and child != parent.base_model_prefix):
            return True
    return parts[-1] in ("visual_projection", "text_projection")


def _surroundings(model: nn.Module, module_name: str) -> tuple[list[nn.Module], Any]:
    """The modules around one, nearest first, and the nearest config that one of them has, or None."""
    # A `ModuleList` is only a container; the module that has it is the real parent.
    around = [module for module in _around(model, module_name) if not isinstance(module, nn.ModuleList)]
    return around, next((found for module in around if (found := _config_of(module)) is not None), None)


def _around(model: nn.Module, module_name: str) -> Iterator[nn.Module]:
    """The modules that contain the one of that name, nearest first, the model itself last."""
    parts = module_name.split(".")
    for count in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:count]))


def _config_of(module: nn.Module) -> Any:
    """A module's config, if it is one of transformers or of diffusers, whose configs are mappings."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "model_type") or isinstance(config, Mapping) else None


def _reason_of_model(around: list[nn.Module], config: Any) -> str | None:
    """Why no layer of the model that has this config sees patches in the order of their grid; None if some do."""
    where = "form='grid' cannot adapt module {}"
    causal = [
        type(module).__name__
        for module in around
        if getattr(module, "is_causal", False) is True or "CausalLM" in type(module).__name__
    ]
    language = hasattr(config, "vocab_size") and not hasattr(config, "image_size")
    if causal or getattr(config, "is_decoder", False) or language:
        name = causal[0] if causal else config.model_type
        return (
            f"{where}, which is part of a language model ({name}): its tokens lie on no grid, and in a causal model a "
            "wavelet over time would leak the future. form='subband' can adapt it."
        )
    if getattr(config, "window_size", 0) or getattr(config, "num_windows", 1) > 1:
        return (
            f"{where} of a {config.model_type} model: its layers see windows of patches, not their grid. "
            "form='subband' can adapt it."
        )
    model_type = getattr(config, "model_type", None)
    if model_type in OTHER_ORDERS:
        return f"{where} of a {model_type} model: {OTHER_ORDERS[model_type]}"
    return None


def _size(config: Any) -> tuple[int, int] | None:
    image = _pair(getattr(config, "image_size", None) or getattr(config, "sample_size", None))
    patch = _pair(getattr(config, "patch_size", None))
    return None if image is None or patch is None else (image[0] // patch[0], image[1] // patch[1])


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return value[0], value[1]
    return None


def _prefix_tokens(model: nn.Module) -> int | None:
    """Number of prefix tokens for which the model has embeddings; None if none has a known name."""
    # The keys are the last parts of names, so a token that stands in several places of the model counts once.
    found = {
        name.rpartition(".")[2]: parameter.shape[1] if parameter.ndim == 3 else 1
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in PREFIX_PARAMETERS
    }
    return sum(found.values()) or None
