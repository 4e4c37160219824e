"""Poolings that compare_attention.py compares `wara_peft.attention` with, called as `LowRankMultiHeadPooling` is."""

from .additive import AdditivePooling
from .structured import StructuredSelfAttentionPooling
from .transformer import TransformerPooling

__all__ = ["AdditivePooling", "StructuredSelfAttentionPooling", "TransformerPooling"]
