"""Linear layers whose weight is a product of smaller matrices; they know nothing of how they came about."""

from .dictionary_linear import DictionaryLinear
from .low_rank_linear import LowRankLinear, factorize_linear

__all__ = ["DictionaryLinear", "LowRankLinear", "factorize_linear"]
