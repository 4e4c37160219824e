"""Layers whose weight is made of smaller matrices. They do not know the methods of compression that make them."""

from .dense_sparse_linear import DenseSparseLinear
from .dictionary_linear import DictionaryLinear
from .low_rank_conv import LowRankConv, factorize_conv
from .low_rank_linear import LowRankLinear, factorize_linear
from .low_rank_plus_sparse_linear import LowRankPlusSparseLinear
from .ordered import OrderedLowRankLinear
from .shared_base_linear import SharedBaseLinear

__all__ = [
    "DenseSparseLinear",
    "DictionaryLinear",
    "LowRankConv",
    "LowRankLinear",
    "LowRankPlusSparseLinear",
    "OrderedLowRankLinear",
    "SharedBaseLinear",
    "factorize_conv",
    "factorize_linear",
]
