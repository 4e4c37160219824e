"""The embeddings of a base model, where it says which these are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def embedding_or_none(getter: Callable[[], nn.Module | None]) -> nn.Module | None:
    """What a model's function for one of its embeddings returns, or None where transformers knows no such layer."""
    try:
        return getter()
    except (AttributeError, NotImplementedError):
        return None


def embeddings(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the output layer of a model of transformers, None where it has none."""
    getters = (getattr(model, name, lambda: None) for name in ("get_input_embeddings", "get_output_embeddings"))
    input_embedding, output_layer = map(embedding_or_none, getters)
    return input_embedding, output_layer
