"""Finds the biases and embeddings that are saved with an adapter besides its factors, and their keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..base_layers.embeddings import embeddings
from ..base_layers.kinds import known_kind
from ..compiled import plain_name
from ..config import WaRAConfig
from ..layers.base import WaRALayer
from ..layers.lookup import AROUND, adapted_layers, without_wrappers
from ..layers.parameters import AdaptedModule

OF_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of a parameter's name that come from FSDP's and checkpointing's wrappers. Keys of a state dict lack them."""


def saved_besides_factors(
    model: nn.Module, config: WaRAConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Select the tensors of a state dict that belong to an adapter and that PEFT itself would not save, by key."""
    biases = trained_biases(model, config, adapter_name, state_dict)
    return biases | _resized_embedding(model, config, state_dict)


def trained_biases(
    model: nn.Module, config: WaRAConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Select from a state dict the biases that train with an adapter, by the keys under which they are saved.

    With `bias="wara_only"` these are the biases of the adapted layers. Each layer says which parameter its bias is: it
    may lie beside the weight, in a factor of a factorised layer, or in the module that has an adapted parameter.

    If only other adapters adapt a layer, its bias is saved under the key that it has without these adapters.
    """
    if config.bias == "none":
        return {}
    layers = {OF_WRAPPERS.sub("", name): layer for name, layer in adapted_layers(model, adapter_name).items()}
    if config.bias == "all":
        keys = {key for key in state_dict if key == "bias" or key.endswith(".bias")}
    else:
        of_layers = {id(bias) for layer in layers.values() if (bias := getattr(layer, "bias", None)) is not None}
        named = model.named_parameters(remove_duplicate=False)
        keys = {OF_WRAPPERS.sub("", name) for name, parameter in named if id(parameter) in of_layers}
    own, in_full = set(layers), list[str]()
    for name, module in model.named_modules():
        name = OF_WRAPPERS.sub("", name)
        if isinstance(module, AdaptedModule) and any(f"{name}.{layer}" in layers for layer in module.layers):
            own.add(name)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            own.add(name)
            in_full += [f"{name}."] if isinstance(module, ModulesToSaveWrapper) else []
    return {
        _without_others(key, own): value
        for key, value in state_dict.items()
        if key in keys and not key.startswith(tuple(in_full))  # PEFT saves modules that train in full, with biases
    }


def _without_others(key: str, own: set[str]) -> str:
    """Remove from a key the parts that come from wrappers around modules, except for modules that are in `own`."""
    return AROUND.sub(lambda found: found[0] if key[: found.start()] in own else "", key)


def keys_in_model(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict's keys to the model's own, which `torch.compile` and other adapters may have changed."""
    known = model.state_dict().keys()
    if all(key in known for key in state_dict):
        return dict(state_dict)
    places = {without_wrappers(plain_name(key)): key for key in known}
    return {
        key if key in known else places.get(without_wrappers(key), key): value for key, value in state_dict.items()
    }


def _resized_embedding(model: Any, config: WaRAConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the second embedding, if only one of the two is adapted and the vocabulary was resized.

    PEFT saves either both embeddings of such a model in full, or only the adapted one. To load the adapter, the user
    must first resize the base model. This draws new random rows for the other embedding, so its rows must be saved.
    """
    layers = embeddings(model)
    adapted = [layer for layer in layers if isinstance(layer, WaRALayer)]
    others = [layer for layer in layers if layer is not None and known_kind(layer)]
    if (
        len(adapted) != 1
        or len(others) != 1
        or others[0].weight is adapted[0].weight
        or not _is_resized(model, config)
    ):
        return {}
    name = next(OF_WRAPPERS.sub("", name) for name, module in model.named_modules() if module is others[0])
    return {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}


def _is_resized(model: Any, config: WaRAConfig) -> bool:
    """Say whether the base model's config on this machine, if there is one, has another size of vocabulary."""
    own: Any = getattr(model, "config", None)
    base = base_config_on_disk(own, config.base_model_name_or_path or getattr(model, "name_or_path", None))
    if base is None:
        return False
    sizes = {getattr(entry.get_text_config(), "vocab_size", None) for entry in (own, base)}
    return len(sizes) > 1


def base_config_on_disk(config: Any, name_or_path: str | None) -> Any:
    """Read the config with which a base model of transformers was saved; give None if it is not on this machine.

    Args:
        config: the config that the model has now.
        name_or_path: where the base model comes from.
    """
    if not name_or_path or not isinstance(config, PreTrainedConfig):
        return None
    try:
        # Saving an adapter must not wait for the network.
        return type(config).from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
