"""Finding the layers of a model that a function of this package is asked to factorise: its targets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base_layers.embeddings import embeddings
from ..base_layers.tied_weights import names_by_parameter
from ..compiled import on_plain_model
from ..factorized.base import check_values
from ..factorized.low_rank_conv import CONVOLUTIONS, require_conv
from ..factorized.low_rank_linear import require_linear
from ..factorized.plain_forward import computes_product
from ..factorized.saved import FACTORIZED
from ..messages import first_few

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


def separate_replaceable(model: nn.Module, targets: Mapping[str, Layer]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Split targets into those that a factorised layer may replace, and those that stay as they are.

    A target stays if it shares a parameter with another module, or for the reasons of `separate_usual`.

    Returns:
        The replaceable targets, each only under its first name; and a mapping from names of the other targets to the
        reason why they are left.
    """
    names_of = names_by_parameter(model)
    first_names: dict[Layer, str] = {}
    usual, left = separate_usual(targets)
    for name, layer in usual.items():
        if any(len(names_of[id(weight)]) > 1 for weight in layer.parameters()):
            left[name] = TIED
        else:
            first_names.setdefault(layer, name)
    return {name: layer for layer, name in first_names.items()}, left


def separate_usual(targets: Mapping[str, Layer]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Split targets into layers that compute W x + b with a W of their own, and unusual layers.

    Returns:
        The usual layers; and a mapping from names of the unusual ones to what is unusual.
    """
    reasons = {name: _unusual(layer) for name, layer in targets.items()}
    usual = {name: layer for name, layer in targets.items() if reasons[name] is None}
    return usual, {name: reason for name, reason in reasons.items() if reason is not None}


def _unusual(layer: nn.Module) -> str | None:
    if isinstance(layer, (*LINEAR, *CONVOLUTIONS)) and "weight" not in layer._parameters:
        return "its weight is computed from others, as by a parametrization"
    if isinstance(layer, LINEAR) and not computes_product(layer):
        return f"{type(layer).__name__} has a forward of its own, which computes something else"
    if isinstance(layer, CONVOLUTIONS) and type(layer).forward not in [kind.forward for kind in CONVOLUTIONS]:
        return f"{type(layer).__name__} has a forward of its own"
    return None


def reasons_of(left: Mapping[str, str]) -> str:
    """Write which layers are left and why, in one clause for an error's message."""
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        names_by_reason.setdefault(reason, []).append(repr(name))
    return "; ".join(f"{first_few(names)}: {reason}" for reason, names in names_by_reason.items())


def linear_targets(model: nn.Module, target_modules: str | list[str] | None) -> dict[str, nn.Linear | Conv1D]:
    """Give the linear layers that `target_modules` asks for.

    None means all linear layers but those of the model's head; see `heads`.
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
    inside = heads(model) if target_modules is None else set()
    return {name: layer for name, layer in linear_layers(model).items() if layer not in inside}


HEADS = (
    *SEQ_CLS_HEAD_NAMES,
    "answer_head",
    "bbox_embed",
    "bbox_predictor",
    "box_head",
    "class_embed",
    "class_head",
    "class_labels_classifier",
    "class_predictor",
    "classification_head",
    "head",
    "multiple_choice_head",
    "qa_outputs",
    "seq_relationship",
    "sequence_summary",
)
"""Names under which models of transformers keep what turns hidden states into answers, beside PEFT's "score" and
"classifier". The module of such a name may have several layers, as RoBERTa's classifier has."""


@on_plain_model
def heads(model: nn.Module) -> set[nn.Module]:
    """Give the modules that make up a model's output layers.

    These are: the output embedding of a model of transformers; and beside the base models that it holds, the modules
    in `HEADS` and, if it has no output embedding, linear layers that are its own attributes, such as XLNet's
    `logits_proj`. All linear layers of other models are hidden layers, as nothing tells which ones are not.
    """
    output = embeddings(model)[1]
    found = set() if output is None else {output}
    if not isinstance(model, PreTrainedModel):
        return found
    bases = [name for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    of_bases = tuple(f"{name}." for name in bases)
    for name, module in model.named_modules() if bases else ():
        is_own = output is None and isinstance(module, LINEAR) and "." not in name
        if not f"{name}.".startswith(of_bases) and (is_own or not set(HEADS).isdisjoint(name.split("."))):
            found.add(module)
    return found


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
