"""Splits the LoRA of stacked experts into one for each expert and projection, as engines read them.

transformers keeps the experts of a mixture in stacks, such as `experts.gate_up_proj` of shape (experts, 2 m, n), which
it makes on loading from one weight for each expert and projection. Engines name a LoRA's tensors as the base model's
files name these weights. Â of the stack is that of both projections; B̂ is divided between them by rows.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..base_layers.kinds import BareParameter, ModuleShape
from ..base_layers.lora_places import lora_name
from ..disk.adapters.adapter import SavedAdapter
from ..disk.adapters.base_model import empty_model
from ..disk.adapters.contents import PEFT_PREFIX
from ..disk.adapters.source import adapter_directory
from ..disk.checkpoints.checkpoint import Checkpoint

Shapes = Mapping[str, ModuleShape]


@dataclass(frozen=True)
class Projection:
    """A weight of one expert, as the base model's files have it.

    Attributes:
        name: the name of the linear layer that it would be the weight of, as `model.layers.0.mlp.experts.3.up_proj`.
        stack: the name of the parameter in the model that has it, as `model.layers.0.mlp.experts.gate_up_proj`.
        expert: which expert's it is.
        rows: which rows it has of that expert's matrix (m, n), in their order.
    """

    name: str
    stack: str
    expert: int
    rows: Tensor


def stacks_of_experts(shapes: Shapes) -> dict[str, ModuleShape]:
    """Return the adapted stacks of experts."""
    return {name: shape for name, shape in shapes.items() if shape.kind.has_experts}


def whole_experts(model: PreTrainedModel, shapes: Shapes) -> dict[str, ModuleShape]:
    """Return all stacks of the modules that have an adapted one: an engine wants every projection of an expert."""
    found: dict[str, ModuleShape] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in stacks_of_experts(shapes)):
        module = model.get_submodule(owner)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                found[f"{owner}.{name}"] = BareParameter(module, name).module_shape
    return found


def model_without_weights(
    model: nn.Module | str | os.PathLike[str], adapter_name: str, base: str | os.PathLike[str] | None
) -> PreTrainedModel:
    """Make the base model of an adapter on the meta device, to learn names from it.

    Args:
        model: a model with the adapter, or the path of a saved one.
        base: for a path, the base model's directory; None means the one that the adapter's config names.

    Raises:
        FileNotFoundError: `base` is no directory.
        ValueError: the model is none of transformers'; or `base` is None, and the config names no directory; or the
            adapter does not fit the base.
    """
    if isinstance(model, nn.Module):
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(inner, PreTrainedModel):
            raise ValueError(
                f"The model is of {type(inner).__name__}, no class of transformers, so nothing tells the names of its "
                "experts in files: export for 'peft' or 'vllm-3d'."
            )
        with torch.device("meta"):
            return type(inner)(copy.deepcopy(inner.config))
    saved = SavedAdapter(adapter_directory(model, adapter_name))
    directory = base or saved.config.base_model_name_or_path
    if not directory or not (base or Path(directory).is_dir()):
        raise ValueError(
            "A LoRA for each expert gets the names that the base model's files have. The adapter's config names "
            f"{f'{str(directory)!r}, which is no directory here' if directory else 'no base model'}: give "
            "base=DIRECTORY (--base DIRECTORY)."
        )
    names = {shape.parameter_of(name): "" for name, shape in saved.modules.items()}
    return empty_model(Checkpoint(Path(directory)), saved, names)


def projections(model: PreTrainedModel, stacks: Shapes) -> list[Projection]:
    """Find where each expert's weights lie in the stacks, by transformers' own conversion from the model to files.

    It converts a stack that holds the numbers of its rows, and what comes out tells which rows went where.

    Args:
        model: the base model; it may be on the meta device.
        stacks: the stacks by name.

    Raises:
        ValueError: the model's files keep experts stacked, or in a form that is no selection of rows.
    """
    numbered = {
        name: torch.arange(shape.experts * shape.out_features).view(
            shape.experts, *shape.kind.weight_shape(shape.out_features, 1)
        )
        for name, shape in stacks.items()
    }
    found = []
    for name, numbers in numbered.items():
        # One at a time, so that it is known what each result is made from.
        written = revert_weight_conversion(model, {name: numbers})
        for key, value in written.items():
            experts, rows = value.flatten() // stacks[name].out_features, value.flatten() % stacks[name].out_features
            if key == name or not key.endswith(".weight") or len(experts.unique()) != 1:
                raise ValueError(
                    f"The files of {model.config.model_type} models have {name!r} as {key!r}, with experts stacked, "
                    "so there are no names for one LoRA for each expert. Export for 'vllm-3d' if vLLM reads stacked "
                    "ones of such models, or merge the adapter."
                )
            found.append(Projection(key.removesuffix(".weight"), name, int(experts[0]), rows))
    return found


def split_experts(
    state_dict: Mapping[str, Tensor], shapes: Shapes, stacks: Shapes, parts: Iterable[Projection]
) -> dict[str, Tensor]:
    """Return a LoRA with its stacked experts replaced by one pair of factors for each expert and projection.

    A projection that is not adapted gets factors that are zero.

    Args:
        state_dict: the LoRA, as PEFT keeps it: lora_A (experts · R, n) and lora_B (m, R · experts) of each stack.
        shapes: the adapted modules.
        stacks: all stacks of the adapted experts' modules.
        parts: the projections of these stacks.
    """
    adapted = {name: f"{PEFT_PREFIX}{lora_name(shapes, name)}" for name in stacks_of_experts(shapes)}
    keys = {f"{place}.lora_{side}.weight" for place in adapted.values() for side in "AB"}
    result = {key: value for key, value in state_dict.items() if key not in keys}
    factors = {}
    for name, place in adapted.items():
        shape = shapes[name]
        lora_a, lora_b = (state_dict[f"{place}.lora_{side}.weight"] for side in "AB")
        factors[name] = (
            lora_a.view(shape.experts, -1, shape.in_features),
            lora_b.view(shape.out_features, -1, shape.experts).permute(2, 0, 1),
        )
    like = next(iter(factors.values()))[0]
    for part in parts:
        if part.stack in factors:
            stacked_a, stacked_b = factors[part.stack]
            pair = stacked_a[part.expert], stacked_b[part.expert, part.rows]
        else:
            rank = like.shape[1]
            pair = like.new_zeros(rank, stacks[part.stack].in_features), like.new_zeros(len(part.rows), rank)
        for side, value in zip("AB", pair, strict=True):
            result[f"{PEFT_PREFIX}{part.name}.lora_{side}.weight"] = value.clone(memory_format=torch.contiguous_format)
    return result
