"""Finds the embeddings of a base model, if the model has functions that return them, as transformers' models do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def embedding_or_none(getter: Callable[[], nn.Module | None]) -> nn.Module | None:
    """Call a model's function for one of its embeddings; return None where transformers knows no such layer."""
    try:
        return getter()
    except (AttributeError, NotImplementedError):  # transformers' functions raise either of these for such a model
        return None


def embeddings(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the input embedding and the output layer of a transformers model; None stands for a missing one."""
    getters = (getattr(model, name, lambda: None) for name in ("get_input_embeddings", "get_output_embeddings"))
    input_embedding, output_layer = map(embedding_or_none, getters)
    return input_embedding, output_layer
