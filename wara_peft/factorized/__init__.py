"""Linear layers whose weight is a product of smaller matrices; they know nothing of how they came about."""

from .dictionary_linear import DictionaryLinear
from .low_rank_linear import LowRankLinear, factorize_linear
from .low_rank_plus_sparse_linear import LowRankPlusSparseLinear

__all__ = ["DictionaryLinear", "LowRankLinear", "LowRankPlusSparseLinear", "factorize_linear"]
