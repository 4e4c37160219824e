"""Other ways to spend few parameters on attention, to compare WaRA with: plain PyTorch modules, useful alone.

Batch first, `key_padding_mask` True = padding, `need_weights` as in `nn.MultiheadAttention`.
"""

from .additive import AdditivePooling
from .classifier import LAMAClassifier, PoolingHead, RecurrentClassifier
from .factorize import Factorization, factorize
from .lama import LowRankMultiHeadPooling
from .linformer import LinformerAttention
from .low_rank import LowRankMultiheadAttention
from .low_rank_linear import LowRankLinear, factorize_linear
from .pooling import orthogonality_penalty
from .structured import StructuredSelfAttentionPooling
from .transformer import TransformerPooling

__all__ = [
    "AdditivePooling",
    "Factorization",
    "LAMAClassifier",
    "LinformerAttention",
    "LowRankLinear",
    "LowRankMultiHeadPooling",
    "LowRankMultiheadAttention",
    "PoolingHead",
    "RecurrentClassifier",
    "StructuredSelfAttentionPooling",
    "TransformerPooling",
    "factorize",
    "factorize_linear",
    "orthogonality_penalty",
]
