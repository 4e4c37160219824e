"""Which layers of a model are to be factorised."""

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
from ..factorized.low_rank_conv import CONVOLUTIONS, require_conv
from ..factorized.low_rank_linear import check_values, require_linear
from ..factorized.saved import FACTORIZED

Layer = TypeVar("Layer", bound=nn.Module)
LINEAR = (nn.Linear, Conv1D)


@on_plain_model
def check_base(model: nn.Module) -> None:
    """Refuse a model whose layers cannot be replaced.

    Raises:
        ValueError: it has PEFT adapters, or is itself a linear layer or an attention.
    """
    if isinstance(model, (*LINEAR, nn.MultiheadAttention)):
        raise ValueError(
            f"model is itself a {type(model).__name__}, which cannot be replaced in place; use factorize_linear or "
            "LowRankMultiheadAttention.from_multihead."
        )
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ValueError(f"{name!r} has a PEFT adapter; merge and unload it, factorise, then add adapters.")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers of a model that are called as such, by name; one with several names under each of them."""
    return {name: layer for name, layer in linear_layers_and_attentions(model).items() if isinstance(layer, LINEAR)}


@on_plain_model
def linear_layers_and_attentions(model: nn.Module) -> dict[str, nn.Linear | Conv1D | nn.MultiheadAttention]:
    """The same, and PyTorch's attentions, each as a whole."""
    found: dict[str, nn.Linear | Conv1D | nn.MultiheadAttention] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.MultiheadAttention, *FACTORIZED)):
            # An attention uses the weight of its out_proj, and does not call it; factors are small already.
            inside += (f"{name}.",)
        if isinstance(module, (*LINEAR, nn.MultiheadAttention)) and not name.startswith(inside):
            found[name] = module
    return found


def select_targets(candidates: Mapping[str, Layer], target_modules: str | list[str] | None) -> dict[str, Layer]:
    """Those that are asked for, as in PEFT: names or ends of names, or a regex for the full name; None means all.

    Raises:
        ValueError: a target matches nothing.
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
    return f".{name}".endswith(f".{target}")


def _no_match(target: object, candidates: Mapping[str, nn.Module]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in candidates})
    return (
        f"target_modules: {target!r} matches no linear layer or attention of the model; names of these end in "
        f"{', '.join(ends) or 'nothing, as there are none'}."
    )


TIED = "its weight is tied to that of another module, which would keep it"


def separate_tied(model: nn.Module, targets: Mapping[str, Layer]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Targets whose weights are their own, each under its first name only; and by name why the others are left."""
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
    """The linear layers that are asked for; None means all but the output layer, as PEFT's "all-linear" does."""
    return select_targets(_linear_candidates(model, target_modules), target_modules)


@on_plain_model
def layer_targets(model: nn.Module, target_modules: str | list[str] | None) -> dict[str, nn.Module]:
    """As `linear_targets`, with convolutions; None leaves those with groups out."""
    linear = _linear_candidates(model, target_modules)
    candidates = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name in linear or (isinstance(module, CONVOLUTIONS) and (target_modules is not None or module.groups == 1))
    }
    return select_targets(candidates, target_modules)


def _linear_candidates(model: nn.Module, target_modules: str | list[str] | None) -> dict[str, nn.Linear | Conv1D]:
    head = embeddings(model)[1] if target_modules is None else None
    return {name: layer for name, layer in linear_layers(model).items() if layer is not head}


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or a convolution, (m, n) or (m, n, *kernel), if it can be factorised.

    Raises:
        ValueError: it is quantized, on the meta device or not finite, the layer computes something of its own, or it
            is a convolution with groups; the message tells of the layer as "it".
    """
    layer = require_conv(layer) if isinstance(layer, CONVOLUTIONS) else require_linear(layer)
    check_values(layer.weight)
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


@contextmanager
def errors_naming(name: str) -> Iterator[None]:
    """Scope in which a ValueError that tells of a layer as "it" gets the layer's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be factorised: {error}") from error


def factorizable_weight(name: str, layer: nn.Module) -> Tensor:
    """As `weight_of`, with the layer's name in errors."""
    with errors_naming(name):
        return weight_of(layer)
