"""Makes parameter groups for an optimizer, in which B gets a higher learning rate than A."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..arguments import check_argument
from ..layers.lookup import adapted_layers

GROUP_OF_PART = {"wara_A": "A", "wara_B": "B", "wara_core": "core", "wara_gain": "gain"}


def optimizer_groups(
    model: nn.Module, lr: float, lr_ratio: float, *, weight_decay: float = 0.0, lr_embedding: float = 1e-6
) -> list[dict[str, Any]]:
    """Sort all parameters that train in a model with WaRA adapters into groups, with the rates of LoRA+.

    The rates are those of `peft.optimizers.create_loraplus_optimizer`, which finds only LoRA's parameters, because it
    looks for their names. The groups are:

    - "A": A_s of all layers except embeddings, at the rate lr;
    - "B": B_s of the same layers, at lr · lr_ratio;
    - "core", "gain": cores of `form="tiny"` and gains of `form="grid"`, at lr;
    - "embedding": A_s and B_s of embeddings, at lr_embedding;
    - "full": modules and tokens that train in full (`modules_to_save`, `trainable_token_indices`), at lr;
    - "vector": biases, norms and other parameters of one dimension, at lr · lr_ratio and without weight decay.

    A parameter trains if it has `requires_grad`; among several adapters these are the active ones. Groups without
    parameters are left out. Each group has a "name", by which it can be found and changed before an optimizer gets it.

    Args:
        model: a model with WaRA adapters.
        lr: learning rate of A.
        lr_ratio: learning rate of B divided by that of A. LoRA+ wants at least 1, and more for harder tasks.
        weight_decay: weight decay of all groups except "vector".
        lr_embedding: learning rate of adapters of embeddings.

    Returns:
        Groups for the first argument of an optimizer; every trained parameter is in exactly one. With `Trainer`:
        `optimizers=(AdamW(groups), None)`, or `optimizer_cls_and_kwargs=(AdamW, {"params": groups})`.

    Raises:
        ValueError: a rate is negative or not finite, or no WaRA adapter of the model trains.

    Source: LoRA+, arXiv 2402.12354.
    """
    check_argument("optimizer_groups(model, lr, lr_ratio)", "model", model, "an nn.Module")
    given = {"lr": lr, "lr_ratio": lr_ratio, "weight_decay": weight_decay, "lr_embedding": lr_embedding}
    for name, value in given.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r} must be finite and at least 0.")
    rates = dict.fromkeys(("A", "B", "core", "gain", "embedding", "full", "vector"), lr)
    rates |= {"B": lr * lr_ratio, "vector": lr * lr_ratio, "embedding": lr_embedding}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    of_adapters = _of_adapters(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = of_adapters.get(parameter) or ("vector" if parameter.ndim == 1 else "full")
            members[group].append(parameter)
    if not any(members[name] for name in ("A", "B", "core", "gain", "embedding")):
        raise ValueError("No WaRA adapter of the model trains. Add one, or activate one by `set_adapter`.")
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates[name],
            "weight_decay": 0.0 if name == "vector" else weight_decay,
        }
        for name, parameters in members.items()
        if parameters
    ]


def _of_adapters(model: nn.Module) -> dict[nn.Parameter, str]:
    """Map each parameter of the adapters to the name of its group."""
    return {
        parameter: "embedding" if layer.kind.has_vocabulary else group
        for layer in adapted_layers(model).values()
        for part, group in GROUP_OF_PART.items()
        for parameter in getattr(layer, part).parameters()
    }
