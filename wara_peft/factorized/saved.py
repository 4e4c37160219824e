"""Factorised layers in a checkpoint. Only names and shapes of tensors tell which layers to make."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .dense_sparse_linear import DenseSparseLinear
from .dictionary_linear import DictionaryLinear
from .key_names import names_on_loading
from .low_rank_conv import CONVOLUTIONS, Convolution, LowRankConv
from .low_rank_linear import LowRankLinear, linear_shape
from .low_rank_plus_sparse_linear import LowRankPlusSparseLinear
from .marks import MARK, mark_files
from .shared_base_linear import SharedBaseLinear, tie_bases

Shapes = Mapping[str, tuple[int, ...]]


Dense = nn.Linear | Conv1D | Convolution


class Kind(NamedTuple):
    """How to recognise a kind of factorised layer by its tensors, and how to make such a layer.

    Attributes:
        parts: names of the tensors that every layer of this kind has.
        bias: name of the bias.
        make: function that makes a layer. It takes the layer to replace, the shapes of the parts, and whether there is
            a bias.
    """

    parts: frozenset[str]
    bias: str
    make: Callable[[Any, Shapes, bool], nn.Module]


LINEAR_KINDS: dict[type[nn.Module], Kind] = {
    LowRankLinear: Kind(
        frozenset({"down.weight", "up.weight"}),
        "up.bias",
        lambda layer, shapes, bias: LowRankLinear(*linear_shape(layer), _size(shapes["down.weight"], 0), bias),
    ),
    DictionaryLinear: Kind(
        frozenset({"down.weight", "values", "support"}),
        "bias",
        lambda layer, shapes, bias: DictionaryLinear(
            *linear_shape(layer), _size(shapes["down.weight"], 0), _size(shapes["values"], 1), bias
        ),
    ),
    DenseSparseLinear: Kind(
        frozenset({"bases", "values", "support"}),
        "bias",
        lambda layer, shapes, bias: DenseSparseLinear(
            *linear_shape(layer),
            _size(shapes["bases"], 1),
            _size(shapes["bases"], 2),
            _size(shapes["values"], 1),
            bias,
        ),
    ),
    SharedBaseLinear: Kind(
        frozenset({"values", "support", "group"}),
        "bias",
        lambda layer, shapes, bias: _shared(layer, shapes, bias),
    ),
    LowRankPlusSparseLinear: Kind(
        frozenset({"down", "up", "values", "indices", "alpha"}),
        "bias",
        lambda layer, shapes, bias: LowRankPlusSparseLinear(
            *linear_shape(layer), _size(shapes["down"], 0), _size(shapes["values"], 0), bias=bias, seed=None
        ),
    ),
}
CONVOLUTION_KINDS: dict[type[nn.Module], Kind] = {
    LowRankConv: Kind(
        frozenset({"down.weight", "up.weight"}),
        "up.bias",
        lambda layer, shapes, _: LowRankConv(layer, _size(shapes["down.weight"], 0)),
    ),
}
SPATIAL = ("vertical.weight", "horizontal.weight")
"""Tensors of a kind of layer that only 0.1.0 had: a convolution along the height, and then one along the width."""
FACTORIZED = (*LINEAR_KINDS, *CONVOLUTION_KINDS)
OPENED: dict[type[nn.Module], Callable[[Any, int], nn.Module]] = {}
"""Modules that are factorised as one unit, such as PyTorch's attention. The function makes the module's replacement,
whose linear layers are dense and without values. It takes the module and the rank. `attention` fills this table."""


def put_in_place(model: nn.Module, shapes: Shapes) -> list[str]:
    """Replace dense layers, in place, by the factorised layers that a checkpoint has for them.

    Args:
        model: a model without values. New layers have the default device and dtype.
        shapes: shapes of the checkpoint's tensors, by key. Keys may have or lack the prefix of the model's base model,
            and may be those that transformers renames when it loads the model.

    Returns:
        Names of the layers replaced, all names of each.

    Raises:
        ValueError: the shapes of factors do not fit the layer or each other, the checkpoint has the layer's dense
            weight too, or the layer is of a kind that only 0.1.0 had.
    """
    prefix = getattr(model, "base_model_prefix", "")
    renamed = {name: shapes[key] for key, name in names_on_loading(model, shapes).items()}
    shapes = {**shapes, **renamed}
    _open(model, prefix, shapes)
    replaced = []
    bases: dict[int, nn.Parameter] = {}
    # transformers has collected tied parameters when it made the model, before the layers were replaced.
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    names_of: dict[Dense, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (nn.Linear, Conv1D, *CONVOLUTIONS)):
            names_of.setdefault(layer, []).append(name)
    for layer, names in names_of.items():
        # A layer with several names may have its tensors under one of them only.
        keys = [key for name in names for key in _with_and_without(prefix, name)]
        made = (_of(key, layer, shapes) for key in dict.fromkeys(keys))
        factorised = next((found for found in made if found is not None), None)
        if factorised is None:
            continue
        if isinstance(factorised, SharedBaseLinear):
            factorised.base = bases.setdefault(factorised.number, factorised.base)
        factorised.train(layer.training)
        for name in names:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, factorised)
            for parameter, _ in layer.named_parameters():
                ties.pop(f"{name}.{parameter}", None)
        for name in names[1:]:
            ties |= {f"{name}.{part}": f"{names[0]}.{part}" for part, _ in factorised.named_parameters()}
        replaced += names
    if isinstance(model, PreTrainedModel):
        # The new layers have no such tensors, and need none.
        expected = vars(model).get("_keys_to_ignore_on_load_unexpected") or ()
        marks = {rf"(^|\.){re.escape(name.removeprefix(f'{prefix}.'))}\.weight$" for name in replaced}
        vars(model)["_keys_to_ignore_on_load_unexpected"] = {*expected, *marks}
    tie_bases(model)
    name_tensors(model)
    return replaced


def name_tensors(model: nn.Module) -> None:
    """Let transformers write a model with factorised layers with marks and names of its modules, others as it does."""
    parts = {min(kind.parts) for kind in (*LINEAR_KINDS.values(), *CONVOLUTION_KINDS.values())}
    mark_files(model, parts, FACTORIZED)


def _with_and_without(prefix: str, name: str) -> tuple[str, str, str]:
    """Give the keys that a module may have in a checkpoint of the model, of its base model, or of one with a head."""
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"


def _open(model: nn.Module, prefix: str, shapes: Shapes) -> None:
    """Replace modules in `OPENED` whose linear layers have factors in the checkpoint."""
    opened = set()
    for parent_name, parent in list(model.named_modules()):
        for attribute, module in list(parent.named_children()):
            if type(module) not in OPENED:
                continue
            for key in _with_and_without(prefix, f"{parent_name}.{attribute}".removeprefix(".")):
                down = shapes.get(f"{key}.q_proj.down.weight")
                if down is not None:
                    made = OPENED[type(module)](module, _size(down, 0))
                    setattr(parent, attribute, made)
                    opened.add(made)
                    # Transformers would draw values for tensors that the old module had.
                    vars(parent)["_is_hf_initialized"] = True
                    break
    use_no_nested_tensors(model, opened)


def use_no_nested_tensors(model: nn.Module, attentions: Container[nn.Module]) -> None:
    """Switch nested tensors off in PyTorch's encoders that have one of these attentions.

    In evaluation mode `TransformerEncoder` reads `self_attn.in_proj_weight` of its first layer to decide on nested
    tensors. An attention that was replaced has no such weight.
    """
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(module in attentions for module in encoder.modules()):
            encoder.use_nested_tensor = False


def kinds_and_sizes(model: nn.Module) -> dict[str, dict[str, object]]:
    """Kind and sizes of each factorised layer of a model, by the layer's name."""
    found: dict[str, dict[str, object]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        for kind in FACTORIZED:
            if isinstance(layer, kind):
                sizes = {size: int(getattr(layer, size)) for size in cast(Any, layer).sizes}
                found[name] = {"kind": kind.__name__, **sizes}
    return found


def _of(key: str, layer: Dense, shapes: Shapes) -> nn.Module | None:
    kinds = CONVOLUTION_KINDS if isinstance(layer, CONVOLUTIONS) else LINEAR_KINDS
    if isinstance(layer, nn.Conv2d) and {f"{key}.{part}" for part in SPATIAL} <= shapes.keys():
        raise ValueError(
            f"{key!r} is a SpatialLowRankConv2d, which wara-peft 0.1.0 wrote and later releases cannot compute: with "
            "0.1.0 load the model, make it dense by `wara_peft.compression.to_dense(model)`, and save it by "
            "`model.save_pretrained`; or compress the original model again."
        )
    if f"{key}.factors.bases" in shapes:
        raise ValueError(
            f"{key!r} is a StraightThroughLinear, which is still being trained: resume the training, or call "
            "`StraightThroughFactorizer.finish` before the model is saved."
        )
    there = {part for known in kinds.values() for part in known.parts if f"{key}.{part}" in shapes}
    complete = [kind for kind, known in kinds.items() if known.parts <= there]
    if not complete:
        return None
    known = kinds[complete[0]]
    if len(complete) > 1 or shapes.get(f"{key}.weight", MARK) != MARK:
        raise ValueError(f"{key!r} has factors of several kinds in the checkpoint, or a dense weight beside them.")
    own = {part: shapes[f"{key}.{part}"] for part in known.parts}
    try:
        made = known.make(layer, own, f"{key}.{known.bias}" in shapes)
    except ValueError as error:
        raise ValueError(f"The checkpoint has factors of {key!r} that no layer has: {error}") from error
    for part, tensor in made.state_dict().items():
        if part == "base" and f"{key}.base" not in shapes:
            continue  # another layer of the group has it
        if shapes.get(f"{key}.{part}") != tensor.shape:
            raise ValueError(
                f"The checkpoint has {f'{key}.{part}'!r} of shape {shapes.get(f'{key}.{part}')}, where "
                f"{_described(layer)} with the other factors of {key!r} needs {tuple(tensor.shape)}."
            )
    return made


def _described(layer: Dense) -> str:
    if isinstance(layer, CONVOLUTIONS):
        return f"a convolution of weight {tuple(layer.weight.shape)}"
    n, m = linear_shape(layer)
    return f"a layer of {n} inputs and {m} outputs"


def _size(shape: tuple[int, ...], axis: int) -> int:
    return shape[axis] if axis < len(shape) else 0


def _shared(layer: Any, shapes: Shapes, bias: bool) -> SharedBaseLinear:
    n, m = linear_shape(layer)
    transposed = _size(shapes["group"], 1) == 2
    width, columns = (n, m) if transposed else (m, n)
    base = nn.Parameter(torch.empty(width, _size(shapes["support"], 0)))
    made = SharedBaseLinear(base, columns, transposed, bias, _size(shapes["group"], 0))
    made.values = nn.Parameter(torch.empty(_size(shapes["values"], 0)))
    return made
