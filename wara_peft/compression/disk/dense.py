"""Turning factorised layers into dense ones, in memory and on disk, for programs that know only dense layers."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...arguments import check_argument
from ...compiled import on_plain_model
from ...disk.checkpoints.directory import written_at_once
from ...factorized.low_rank_conv import CONVOLUTIONS
from ...factorized.saved import FACTORIZED
from ...messages import first_few
from ..replacement import count_parameters, replace_everywhere
from ..targets import check_base
from ..training.dense_sparse import StraightThroughLinear


class DenseLayers(list[str]):
    """The names of the layers that `to_dense` replaced. Printed, it says what they cost.

    Attributes:
        parameters_before, parameters_after: parameters of the whole model; a shared parameter counts once.
        bytes_before, bytes_after: bytes of the model's parameters and buffers.
    """

    def __init__(self, names: Iterable[str], before: tuple[int, int], after: tuple[int, int]) -> None:
        super().__init__(names)
        self.parameters_before, self.bytes_before = before
        self.parameters_after, self.bytes_after = after

    def __str__(self) -> str:
        return (
            f"{len(self)} layers made dense: {self.parameters_after:,} parameters in place of "
            f"{self.parameters_before:,}, and {self.bytes_after:,} bytes in place of {self.bytes_before:,} "
            f"({self.bytes_after / max(1, self.bytes_before):.2f} times)."
        )


@on_plain_model
def to_dense(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> DenseLayers:
    """Replace all factorised layers of a model, in place, by dense layers of the same weight, and write the model.

    Use it for deployment where dense layers are faster, or where a program knows only dense layers: with `path`, any
    engine that knows the model's architecture can load the directory. Save a tokenizer beside it by its own
    `save_pretrained`. A model of transformers gets `Conv1D` layers where its class has them (GPT-2).

    Args:
        model: a model with factorised layers.
        path: directory to write a model of transformers to; None writes nothing.
        overwrite: replace `path` if it exists.
        max_shard_size: as in `save_pretrained`.

    Returns:
        Names of the layers replaced. Printed, they say what the dense layers cost in parameters and bytes.

    Raises:
        TypeError: `path` is given, and the model is no model of transformers.
        ValueError: the model has no factorised layer, has a `StraightThroughLinear`, or has PEFT adapters; or `path`
            is given, and it exists, or the model's class has no dense layer where a factorised one is.
    """
    check_argument("to_dense(model)", "model", model, "an nn.Module")
    check_base(model)
    names = [name for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, FACTORIZED)]
    if not names:
        kinds = [kind.__name__ for kind in FACTORIZED]
        raise ValueError(f"The model has no factorised layer: no {first_few(kinds, len(kinds))}.")
    trained = [repr(name) for name, layer in model.named_modules() if isinstance(layer, StraightThroughLinear)]
    if trained:
        raise ValueError(f"{first_few(trained)} is still being trained; call StraightThroughFactorizer.finish first.")
    classes = _classes(model)
    if path is not None:
        _check_writable(model, names, classes)
    # The directory comes first, as it may be refused, and the model must not be changed then.
    mode: Literal["replace", "refuse"] = "replace" if overwrite else "refuse"
    with nullcontext() if path is None else written_at_once(path, mode) as directory:
        before = _sizes(model)
        # A dict, so that a layer with several names is made dense once and stays one layer.
        name_of = {model.get_submodule(name): name for name in names}
        replace_everywhere(
            model, {layer: _dense(layer, classes.get(name) is Conv1D) for layer, name in name_of.items()}
        )
        if directory is not None:
            cast(Any, model).save_pretrained(directory, max_shard_size=max_shard_size)
    return DenseLayers(names, before, _sizes(model))


def _classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Give the classes of the layers that a model of transformers has before it is compressed, by name."""
    if not isinstance(model, PreTrainedModel):
        return {}
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    return {name: type(module) for name, module in empty.named_modules(remove_duplicate=False)}


def _check_writable(model: nn.Module, names: list[str], classes: dict[str, type[nn.Module]]) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no PreTrainedModel, so there is no config to write. Call to_dense without "
            "path, and save the state_dict."
        )
    kinds = (nn.Linear, Conv1D, *CONVOLUTIONS)
    unknown = [repr(name) for name in names if not issubclass(classes.get(name, nn.Module), kinds)]
    if unknown:
        raise ValueError(
            f"{type(model).__name__} has no dense layer of the name {first_few(unknown)}, so nothing could load the "
            "directory. Call to_dense without path, and save the state_dict."
        )


def _dense(layer: Any, transposed: bool) -> nn.Module:
    made: nn.Linear = layer.dense()
    if not transposed:
        return made
    with torch.device("meta"):
        conv = Conv1D(made.out_features, made.in_features)  # type: ignore[no-untyped-call]
    conv.weight = nn.Parameter(made.weight.detach().T.contiguous())
    # A Conv1D always has a bias.
    conv.bias = made.bias if made.bias is not None else nn.Parameter(made.weight.new_zeros(made.out_features))
    return conv.train(made.training)


def _sizes(model: nn.Module) -> tuple[int, int]:
    return count_parameters(model), sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
