"""Layers whose weight is that of another layer, as output layers share the input embedding's."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import find_parameter_name_by_module
from torch import nn

from ..base_layers.tied_weights import modules_by_parameter
from ..layers.lookup import adapted_layers, without_wrappers
from ..messages import first_few


def adapt_embedding_of_tied(model: Any, config: Any, tied: list[str]) -> None:
    """Target the input embedding, and leave the layers tied to it, which these names mean, to its adapter."""
    config.target_modules_to_tie = {without_wrappers(name) for name in tied}
    embedding = find_parameter_name_by_module(model, model.get_input_embeddings())
    if isinstance(config.target_modules, str):
        config.target_modules = rf"(?:{config.target_modules})|{re.escape(embedding)}"
    else:
        # Names of tied layers stay, by which PEFT knows on loading that there is something to tie.
        config.target_modules = {embedding, *config.target_modules}


def train_embedding_of_tied(model: Any, config: Any, tied: list[str]) -> None:
    """Train the input embedding in full, and let the layers tied to it, which these names mean, use its copy."""
    config.modules_to_tie = {without_wrappers(name) for name in tied}
    embedding = find_parameter_name_by_module(model, model.get_input_embeddings())
    ends = [f".{name}" for name in config.modules_to_tie]
    others = [name for name in config.modules_to_save if not any(end.endswith(f".{name}") for end in ends)]
    config.modules_to_save = [*(name for name in others if name != embedding), embedding]


def keep_ties_in_replicas(model: nn.Module) -> None:
    """Have replicas of a model, as `nn.DataParallel` makes them, tie their layers to their own embedding."""
    tied = any(layer.tied_to for layer in adapted_layers(model).values())
    if tied and _tie_replica not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_tie_replica)


def _tie_replica(model: Any, args: tuple[Any, ...]) -> None:
    if getattr(model, "_is_replica", False):
        embedding = model.get_input_embeddings()
        for layer in adapted_layers(model).values():
            if layer.tied_to:
                layer.tie_again(embedding)


def check_ties(model: nn.Module, merged: dict[str, list[str]]) -> None:
    """Refuse to merge adapters into a weight that another module uses without them.

    Args:
        model: the model.
        merged: the adapters to merge into each adapted module, by its name.

    Raises:
        ValueError: the weight of such a module is tied to that of one that does not have the same adapters.
    """
    users = modules_by_parameter(model, in_every_place=True)
    layers = {name: module for name, module in model.named_modules() if name in merged}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        owner = layer.weight_place()[0]
        users_of_weight = users.get(id(getattr(base, "weight", None)), [])
        # The owner may stand in other places of the model too, where it is called without the adapter.
        own = {
            without_wrappers(user)
            for user in users_of_weight
            if model.get_submodule(user) is owner and user != without_wrappers(user)
        }
        others = [
            repr(other)
            for user in users_of_weight
            if not user.endswith(".original_module")  # whose place a trained copy has taken
            and (other := without_wrappers(user)) not in own
            and not (other in layers and _share_adapters(layer, layers[other], merged[name]))
        ]
        if others:
            raise ValueError(
                f"Cannot merge into module {name!r}: its weight is tied to {first_few(others)}, which would change "
                "too, though the adapter is not used there. Give that module a weight of its own first "
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
    users = modules_by_parameter(model)
    for name, module in trained.items():
        merged = module.active_adapters if adapter_names is None else adapter_names
        users_of_weight = {_plain_name(user) for user in users[id(module.get_base_layer().weight)]}
        others = sorted(repr(other) for other in users_of_weight if sources.get(other) is not sources[name])
        if others and any(adapter in module.trainable_tokens_delta for adapter in merged):
            raise ValueError(
                f"Cannot merge the trained tokens of module {name!r}: its weight is tied to {first_few(others)}, "
                "which would change too, though these tokens are not trained there. Train the same tokens of the "
                "input embedding, to which PEFT ties the others, or give that module a weight of its own first "
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
