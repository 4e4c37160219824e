"""Attention and pooling modules with few parameters, to compare WaRA with; they are plain PyTorch modules.

All take the batch as the first dimension. In a `key_padding_mask` True stands for padding. `need_weights` says whether
attention weights are returned, as in `nn.MultiheadAttention`.
"""

from ..factorized import LowRankLinear, factorize_linear
from .classifier import LAMAClassifier, PoolingHead, RecurrentClassifier
from .lama import LowRankMultiHeadPooling
from .linformer import LinformerAttention
from .low_rank import LowRankMultiheadAttention
from .pooling import orthogonality_penalty

__all__ = [
    "LAMAClassifier",
    "LinformerAttention",
    "LowRankLinear",
    "LowRankMultiHeadPooling",
    "LowRankMultiheadAttention",
    "PoolingHead",
    "RecurrentClassifier",
    "factorize_linear",
    "orthogonality_penalty",
]
