"""Layers whose weight is that of another layer, as output layers share the input embedding's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from ..layers.base import WaRALayer
from ..messages import first


def unwrapped(names: list[str]) -> list[str]:
    """Module names without what an earlier adapter has put around the module."""
    return [name.removesuffix(".base_layer") for name in names]


def without(names: Iterable[str], keys: list[str]) -> list[str]:
    """The names that do not stand for one of these modules."""
    return [name for name in names if not any(key == name or key.endswith(f".{name}") for key in keys)]


def keep_ties_in_replicas(model: nn.Module) -> None:
    """Have replicas of a model, as `nn.DataParallel` makes them, tie their layers to their own embedding."""
    tied = any(isinstance(module, WaRALayer) and module.tied_to for module in model.modules())
    if tied and _tie_replica not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_tie_replica)


def _tie_replica(model: Any, args: tuple[Any, ...]) -> None:
    if getattr(model, "_is_replica", False):
        embedding = model.get_input_embeddings()
        for module in model.modules():
            if isinstance(module, WaRALayer) and module.tied_to:
                module.tie_again(embedding)


def check_ties(model: nn.Module, merged: dict[str, list[str]]) -> None:
    """Refuse to merge adapters into a weight that another module uses without them.

    Args:
        model: the model.
        merged: the adapters to merge into each adapted module, by its name.

    Raises:
        ValueError: the weight of such a module is tied to that of one that does not have the same adapters.
    """
    users: dict[int, list[str]] = {}
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names[module] = _plain_name(name)
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(names[module])
    layers = {name: module for name, module in model.named_modules() if name in merged}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        own = names[layer.weight_place()[0]]
        others = [
            repr(other)
            for other in users.get(id(weight), [])
            if other != own
            and not other.endswith(".original_module")  # whose place a trained copy has taken
            and not (other in layers and _share_adapters(layer, layers[other], merged[name]))
        ]
        if others:
            raise ValueError(
                f"Cannot merge into module {name!r}: its weight is tied to {first(others)}, which would change too, "
                "though the adapter is not used there. Give that module a weight of its own first "
                "(`module.weight = torch.nn.Parameter(module.weight.detach().clone())`, and "
                "`tie_word_embeddings=False` in the model's config), or train the adapter with "
                "`ensure_weight_tying=True`."
            )


def check_token_ties(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Refuse to merge trained tokens into a weight that another module uses without them.

    Args:
        model: the model.
        adapter_names: the adapters to merge; None means the active ones.

    Raises:
        ValueError: the weight of a module with trained tokens is tied to that of one that has others, or none.
    """
    trained = {
        _plain_name(name): module for name, module in model.named_modules() if isinstance(module, TrainableTokensLayer)
    }
    sources = {name: module.tied_adapter or module for name, module in trained.items()}
    weights = {
        (_plain_name(name), id(parameter))
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    }
    for name, module in trained.items():
        merged = module.active_adapters if adapter_names is None else adapter_names
        weight = id(module.get_base_layer().weight)
        others = sorted(repr(o) for o, used in weights if used == weight and sources.get(o) is not sources[name])
        if others and any(adapter in module.trainable_tokens_delta for adapter in merged):
            raise ValueError(
                f"Cannot merge the trained tokens of module {name!r}: its weight is tied to {first(others)}, which "
                "would change too, though these tokens are not trained there. Train the same tokens of the input "
                "embedding, to which PEFT ties the others, or give that module a weight of its own first "
                "(`module.weight = torch.nn.Parameter(module.weight.detach().clone())`, and "
                "`tie_word_embeddings=False` in the model's config)."
            )


def _plain_name(name: str) -> str:
    """A module's name without what adapters and trained tokens have put around it."""
    return re.sub(r"(\.base_layer|\.token_adapter)+$", "", name)


def _share_adapters(layer: Any, other: Any, adapter_names: list[str]) -> bool:
    """Whether the adapters of two layers are one and the same."""
    return all(
        layer.tied_to.get(adapter, layer) is other.tied_to.get(adapter, other)
        for adapter in adapter_names
        if adapter in layer.wara_A or adapter in other.wara_A
    )
