"""The bytes of a model's linear layers, as floats of 16 bits or quantized by bitsandbytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

STORAGES = ("16 bits", "int8", "nf4", "nf4, double")
"""How layers can be stored: as floats; by LLM.int8; in 4 bits with a float32 for each 64 values, or 8 bits for it."""
DEFAULT = ("16 bits", "nf4, double")


def stored(model: nn.Module, layers: Sequence[str], storage: str) -> tuple[nn.Module, int]:
    """Return a model as some of its layers are stored, and the bytes of all tensors in these layers' state dicts.

    Args:
        model: the model, in float32; it stays as it is.
        layers: full names of linear layers and factorised ones. The factors of one are stored like linear layers.
        storage: one of `STORAGES`. Biases have 16 bits in each of them, as transformers keeps them.
    """
    made = copy.deepcopy(model)
    size = 0
    for layer in layers:
        linears = [name for name, module in made.get_submodule(layer).named_modules() if type(module) is nn.Linear]
        for name in linears:
            full = f"{layer}.{name}" if name else layer
            parent, _, last = full.rpartition(".")
            new = _stored(made.get_submodule(full), storage)
            setattr(made.get_submodule(parent), last, new)
            size += sum(tensor.nbytes for tensor in new.state_dict().values())
            if storage == "16 bits":
                new.float()  # computes in float32
    return made.eval(), size


@torch.no_grad()
def _stored(linear: Any, storage: str) -> nn.Module:
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    new: Any
    if storage == "16 bits":
        return linear.half()
    if storage == "int8":
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    else:
        options = {"compress_statistics": storage == "nf4, double", "quant_type": "nf4"}
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, **options, device="meta")
        new.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, **options)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.half(), requires_grad=False)
    return new.to("cpu")  # quantizes the weight
