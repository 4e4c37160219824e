"""Low-rank factorisation of whole models; it knows nothing of adapters, which may target what it makes."""

from ..factorized import LowRankLinear, factorize_linear
from .factorize import Factorization, factorize

__all__ = ["Factorization", "LowRankLinear", "factorize", "factorize_linear"]
