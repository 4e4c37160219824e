"""Other ways to spend few parameters on attention, to compare WaRA with: plain PyTorch modules, useful alone.

Batch first, `key_padding_mask` True = padding, `need_weights` as in `nn.MultiheadAttention`.
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
