"""Finding the layers of a model that a function of this package is asked to factorise: its targets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base_layers.embeddings import embeddings
from ..base_layers.tied_weights import names_by_parameter
from ..compiled import on_plain_model
from ..factorized.base import check_values
from ..factorized.low_rank_conv import CONVOLUTIONS, require_conv
from ..factorized.low_rank_linear import require_linear
from ..factorized.saved import FACTORIZED

Layer = TypeVar("Layer", bound=nn.Module)
LINEAR = (nn.Linear, Conv1D)


@on_plain_model
def check_base(model: nn.Module) -> None:
    """Refuse a model whose layers cannot be replaced.

    Raises:
        ValueError: the model has PEFT adapters, or is itself a linear layer or an attention.
    """
    # Replacing means setting an attribute of the layer's parent, and here there is no parent.
    if isinstance(model, (*LINEAR, nn.MultiheadAttention)):
        raise ValueError(
            f"model is itself a {type(model).__name__}, which cannot be replaced in place; use factorize_linear or "
            "LowRankMultiheadAttention.from_multihead."
        )
    for name, module in model.named_modules():
        # Every layer of a PEFT tuner holds the layer that it adapts as `base_layer`.
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ValueError(f"{name!r} has a PEFT adapter; merge and unload it, factorise, then add adapters.")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Give the linear layers of a model by name. A layer that has several names is there under each of them.

    Linear layers inside an attention of PyTorch or inside a factorised layer are left out: the outer module uses their
    weights in its own way.
    """
    return {name: layer for name, layer in linear_layers_and_attentions(model).items() if isinstance(layer, LINEAR)}


@on_plain_model
def linear_layers_and_attentions(model: nn.Module) -> dict[str, nn.Linear | Conv1D | nn.MultiheadAttention]:
    """Give `linear_layers` and the `nn.MultiheadAttention` modules, which are factorised as one unit, by name."""
    found: dict[str, nn.Linear | Conv1D | nn.MultiheadAttention] = {}
    # `named_modules` names a module before the modules inside it, so `inside` is complete when they come.
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.MultiheadAttention, *FACTORIZED)):
            # An attention reads the weight of its out_proj and never calls that module, so a replacement would not be
            # used. The linear layers in a factorised layer are its factors.
            inside += (f"{name}.",)
        if isinstance(module, (*LINEAR, nn.MultiheadAttention)) and not name.startswith(inside):
            found[name] = module
    return found


def select_targets(candidates: Mapping[str, Layer], target_modules: str | list[str] | None) -> dict[str, Layer]:
    """Give the candidates that `target_modules` asks for.

    Args:
        candidates: layers by name.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all.

    Raises:
        ValueError: `target_modules`, or one entry of the list, matches no candidate.
    """
    if target_modules is None:
        targets = dict(candidates)
    elif isinstance(target_modules, str):
        targets = {name: module for name, module in candidates.items() if re.fullmatch(target_modules, name)}
    else:
        for target in target_modules:
            if not any(_ends_with(name, target) for name in candidates):
                raise ValueError(_no_match(target, candidates))
        targets = {
            name: module
            for name, module in candidates.items()
            if any(_ends_with(name, target) for target in target_modules)
        }
    if not targets:
        raise ValueError(_no_match(target_modules, candidates))
    return targets


def _ends_with(name: str, target: str) -> bool:
    # The dots keep "proj" from matching "q_proj": an end of a name starts at a dot.
    return f".{name}".endswith(f".{target}")


def _no_match(target: object, candidates: Mapping[str, nn.Module]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in candidates})
    return (
        f"target_modules: {target!r} matches no linear layer or attention of the model; names of these end in "
        f"{', '.join(ends) or 'nothing, as there are none'}."
    )


TIED = "its weight is tied to that of another module, which would keep it"


def separate_tied(model: nn.Module, targets: Mapping[str, Layer]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Split targets into those that own all their parameters and those that share one with another module.

    Returns:
        The owners, each only under its first name; and a mapping from names of the other targets to the reason why
        they are left.
    """
    names_of = names_by_parameter(model)
    first_names: dict[Layer, str] = {}
    left = {}
    for name, layer in targets.items():
        if any(len(names_of[id(weight)]) > 1 for weight in layer.parameters()):
            left[name] = TIED
        else:
            first_names.setdefault(layer, name)
    return {name: layer for layer, name in first_names.items()}, left


def linear_targets(model: nn.Module, target_modules: str | list[str] | None) -> dict[str, nn.Linear | Conv1D]:
    """Give the linear layers that `target_modules` asks for.

    None means all linear layers but the model's output layer, as "all-linear" does in PEFT.
    """
    return select_targets(_linear_candidates(model, target_modules), target_modules)


@on_plain_model
def layer_targets(model: nn.Module, target_modules: str | list[str] | None) -> dict[str, nn.Module]:
    """Give the linear layers and convolutions that `target_modules` asks for.

    None means the linear layers of `linear_targets` and all convolutions without groups.
    """
    linear = _linear_candidates(model, target_modules)
    candidates = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name in linear or (isinstance(module, CONVOLUTIONS) and (target_modules is not None or module.groups == 1))
    }
    return select_targets(candidates, target_modules)


def _linear_candidates(model: nn.Module, target_modules: str | list[str] | None) -> dict[str, nn.Linear | Conv1D]:
    # Users who name layers get what they name, the output layer too.
    head = embeddings(model)[1] if target_modules is None else None
    return {name: layer for name, layer in linear_layers(model).items() if layer is not head}


def weight_of(layer: nn.Module) -> Tensor:
    """Give the weight of a linear layer, (m, n), or of a convolution, (m, n, *kernel), if it can be factorised.

    Raises:
        ValueError: the weight is quantized, on the meta device or not finite; or the layer is of a subclass that may
            compute something else, or a convolution with groups. The message calls the layer "it"; `errors_naming`
            puts the name in front.
    """
    layer = require_conv(layer) if isinstance(layer, CONVOLUTIONS) else require_linear(layer)
    check_values(layer.weight)
    # transformers' Conv1D keeps its weight as (n, m).
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


@contextmanager
def errors_naming(name: str) -> Iterator[None]:
    """Context that puts a layer's name in front of the message of a ValueError, which calls the layer "it"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be factorised: {error}") from error


def factorizable_weight(name: str, layer: nn.Module) -> Tensor:
    """Give `weight_of` the layer; errors have the layer's name."""
    with errors_naming(name):
        return weight_of(layer)
