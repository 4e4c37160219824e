"""Low-rank factorisation of whole models; it knows nothing of adapters, which may target what it makes."""

from ..factorized import LowRankLinear, factorize_linear
from .calibrate import calibrate
from .factorize import Factorization, factorize
from .statistics import LayerStatistics, load_statistics, save_statistics

__all__ = [
    "Factorization",
    "LayerStatistics",
    "LowRankLinear",
    "calibrate",
    "factorize",
    "factorize_linear",
    "load_statistics",
    "save_statistics",
]
