"""Weight tying: layers that share their weight with another layer, as output layers do with the input embedding."""

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
    """Change a config to adapt the input embedding, and to let the layers tied to it use the same adapter.

    Args:
        model: the model.
        config: the config, which is changed in place.
        tied: names of the tied layers.
    """
    config.target_modules_to_tie = {without_wrappers(name) for name in tied}
    embedding = find_parameter_name_by_module(model, model.get_input_embeddings())
    if isinstance(config.target_modules, str):
        config.target_modules = rf"(?:{config.target_modules})|{re.escape(embedding)}"
    else:
        # The names of tied layers stay in the config: when PEFT loads it, they tell that there are layers to tie.
        config.target_modules = {embedding, *config.target_modules}


def train_embedding_of_tied(model: Any, config: Any, tied: list[str]) -> None:
    """Change a config to train the input embedding in full, and to let the layers tied to it use the trained copy.

    Args:
        model: the model.
        config: the config, which is changed in place.
        tied: names of the tied layers.
    """
    config.modules_to_tie = {without_wrappers(name) for name in tied}
    embedding = find_parameter_name_by_module(model, model.get_input_embeddings())
    ends = [f".{name}" for name in config.modules_to_tie]
    others = [name for name in config.modules_to_save if not any(end.endswith(f".{name}") for end in ends)]
    config.modules_to_save = [*(name for name in others if name != embedding), embedding]


def keep_ties_in_replicas(model: nn.Module) -> None:
    """Make replicas of a model, such as those of `nn.DataParallel`, tie their layers to their own embedding.

    A tied layer refers to the embedding outside of its modules and parameters. Replicating copies this reference, so
    that it would point to the embedding of the original model, on another device.
    """
    tied = any(layer.tied_to for layer in adapted_layers(model).values())
    # A replica gets the hooks of the model, and calls them in its own thread, before its forward.
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
        merged: for each adapted module, by name, the adapters to merge.

    Raises:
        ValueError: another module shares the weight of one of these modules, and does not have the same adapters.
    """
    users = modules_by_parameter(model, in_every_place=True)
    layers = {name: module for name, module in model.named_modules() if name in merged}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        owner = layer.weight_place()[0]
        users_of_weight = users.get(id(getattr(base, "weight", None)), [])
        # In its own place the owner lies inside of the adapter layer, so that its name there has wrappers. It may
        # stand in other places of the model too, where it is called without the adapter.
        own = {
            without_wrappers(user)
            for user in users_of_weight
            if model.get_submodule(user) is owner and user != without_wrappers(user)
        }
        others = [
            repr(other)
            for user in users_of_weight
            if not user.endswith(".original_module")  # never called: PEFT uses a trained copy in its place
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
        ValueError: a module with trained tokens shares its weight with one that has other trained tokens, or none.
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
    """Remove from a module's name the parts that come from wrappers of adapters and trained tokens."""
    return re.sub(r"(\.base_layer|\.token_adapter)+$", "", name)


def _share_adapters(layer: Any, other: Any, adapter_names: list[str]) -> bool:
    """Say whether two layers use the same adapters: one is tied to the other, or both to a third."""
    return all(
        layer.tied_to.get(adapter, layer) is other.tied_to.get(adapter, other)
        for adapter in adapter_names
        if adapter in layer.wara_A or adapter in other.wara_A
    )
