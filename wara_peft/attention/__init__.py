"""Other ways to spend few parameters on attention, to compare WaRA with: plain PyTorch modules, useful alone.

Batch first, `key_padding_mask` True = padding, `need_weights` as in `nn.MultiheadAttention`.
"""

import importlib
from typing import Any

from ..factorized import LowRankLinear, factorize_linear
from .additive import AdditivePooling
from .classifier import LAMAClassifier, PoolingHead, RecurrentClassifier
from .lama import LowRankMultiHeadPooling
from .linformer import LinformerAttention
from .low_rank import LowRankMultiheadAttention
from .pooling import orthogonality_penalty
from .structured import StructuredSelfAttentionPooling
from .transformer import TransformerPooling

__all__ = [
    "AdditivePooling",
    "LAMAClassifier",
    "LinformerAttention",
    "LowRankLinear",
    "LowRankMultiHeadPooling",
    "LowRankMultiheadAttention",
    "PoolingHead",
    "RecurrentClassifier",
    "StructuredSelfAttentionPooling",
    "TransformerPooling",
    "factorize_linear",
    "orthogonality_penalty",
]


def __getattr__(name: str) -> Any:
    """`factorize` and `Factorization`, which are in `wara_peft.compression` now: that imports this package."""
    if name in ("Factorization", "factorize"):
        return getattr(importlib.import_module("wara_peft.compression"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
