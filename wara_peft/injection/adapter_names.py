"""Refuses names of adapters with which PEFT would save incomplete files.

PEFT tells the tensors of several adapters apart by searching their keys for the adapters' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..base_layers.embeddings import embeddings
from ..base_layers.kinds import BareParameter
from ..config import WaRAConfig
from ..layers.base import TENSOR_PARTS
from ..layers.lookup import adapted_layers
from .target_checks import names_in_full

OF_PARTS = (
    *TENSOR_PARTS,
    "base_layer",
    "modules_to_save",
    "original_module",
    "token_adapter",
    "trainable_tokens_delta",
    "weight",
    "bias",
)
"""Names that PEFT and WaRA's layers give to parts of an adapted module, and that occur in keys."""


def check_adapter_name(adapter_name: str) -> None:
    """Refuse an adapter's name that parts of every adapter have too.

    Raises:
        ValueError: the name is one of these.
    """
    # Factors keep their parameters as level0, level1, ... or A_level0, ..., and subbands are called aa2, da1, ...
    if adapter_name in OF_PARTS or re.fullmatch(r"([AB]_)?level\d+|[ad][ad]\d+", adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a parameter or a part of WaRA adapters, and saving "
            "would write an empty or incomplete file. Choose another name."
        )


def check_saved_apart(
    model: nn.Module, configs: Mapping[str, WaRAConfig], adapter_name: str, targets: Mapping[str, nn.Module]
) -> None:
    """Refuse a new adapter if PEFT would omit or rename tensors of this or of another adapter when it saves them.

    If a model has several adapters, PEFT omits from each one's file all keys that contain the name of another adapter
    between two dots. It also removes an adapter's own name from the end of keys, even if the name there is a module's.

    Args:
        model: the model, without the new adapter.
        configs: configs of all adapters, the new one included, by name.
        adapter_name: the new adapter's name.
        targets: the layers and parameters that the new adapter adapts, by name.

    Raises:
        ValueError: an adapter has the name of a module on the path to a tensor that another adapter saves; the new
            adapter has the name of a module that it saves in full; or an adapter's name ends like the name of such a
            module.
    """
    ending = [(name, end) for name in configs for end in names_in_full(configs[adapter_name]) if name.endswith(end)]
    if ending:
        name, end = ending[0]
        raise ValueError(
            f"The adapter's name {name!r} ends like {end!r} in `modules_to_save` or `trainable_token_indices`, and "
            "PEFT would take the adapter's factors for a module of that name. Choose another name."
        )
    in_full = list(_saved_in_full(model, configs[adapter_name], targets))
    own = next((name for name in in_full if adapter_name in name.split(".")[-2:]), None)
    if own is not None:
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a module in {own!r}, which this adapter trains in "
            "full, and PEFT would save it under another key. Choose another name."
        )
    others = {name: config for name, config in configs.items() if name != adapter_name}
    for other in others:
        path = _path_with(other, [*targets, *in_full])
        if path is not None:
            raise ValueError(
                f"Adapter {adapter_name!r} cannot be added beside {other!r}, which has the name of a module on the "
                f"path to {path!r}: PEFT would leave this out of the file of {adapter_name!r}. Load {other!r} under "
                "another name."
            )
    for other, config in others.items():
        adapted = adapted_layers(model, other)
        path = _path_with(adapter_name, [*adapted, *_saved_in_full(model, config, adapted)])
        if path is not None:
            raise ValueError(
                f"adapter_name={adapter_name!r} is also the name of a module on the path to {path!r}, which adapter "
                f"{other!r} adapts or trains, and PEFT would leave this out of the file of {other!r}. Choose another "
                "name."
            )


def _path_with(adapter_name: str, names: Iterable[str]) -> str | None:
    """Find the first of these names whose key in a `PeftModel` contains the adapter's name between two dots.

    There keys begin with "base_model.model.", so that "model" is on every path.
    """
    return next((name for name in names if adapter_name in ("model", *name.split("."))), None)


def _saved_in_full(model: nn.Module, config: WaRAConfig, targets: Mapping[str, nn.Module]) -> Iterator[str]:
    """Give the keys of the tensors that PEFT saves besides the factors.

    They include the keys of all embeddings, because PEFT saves embeddings if the vocabulary was resized.
    """
    resizable = [layer for layer in embeddings(model) if layer is not None]
    for name, module in model.named_modules():
        original = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        is_embedding = any(original is layer for layer in resizable)
        if name.endswith(names_in_full(config)) or (name and is_embedding):
            # The base layer's keys only: those of factors have the names of the adapters that they belong to.
            base = original.get_base_layer() if isinstance(original, BaseTunerLayer) else original
            yield from (f"{name}.{key}" for key in base.state_dict())
        elif config.bias != "none" and getattr(module, "bias", None) is not None:
            layer = targets.get(name)
            if layer is not None and not isinstance(layer, BareParameter):
                yield f"{name}.base_layer.bias"
            elif config.bias == "all" or layer is not None or name.rpartition(".")[0] in targets:
                yield f"{name}.bias"
