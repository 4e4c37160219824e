"""Low-rank factorisation of whole models. This package does not use adapters; adapters may target its layers."""

from ..factorized import (
    DenseSparseLinear,
    DictionaryLinear,
    LowRankConv,
    LowRankLinear,
    LowRankPlusSparseLinear,
    OrderedLowRankLinear,
    SharedBaseLinear,
    factorize_conv,
    factorize_linear,
)
from .compress import compress
from .disk.by_block import compress_by_block
from .disk.dense import DenseLayers, to_dense
from .disk.model import load_compressed, save_compressed
from .disk.state_dict import load_factorized
from .factorize import factorize
from .kv_cache import LowRankCache, cache_bases
from .methods import SVD, Activation, ActivationFisher, Dictionary, Fisher, Method, OneShotDictionary
from .report import CompressionReport, Factorization, LayerReport
from .statistics.collect import calibrate
from .statistics.layer_statistics import LayerStatistics, load_statistics, save_statistics
from .text_head import LowRankTextHead
from .training.dense_sparse import StraightThroughFactorizer, StraightThroughLinear, dense_sparse, straight_through
from .training.ordered import OrderedRankTraining, ordered_low_rank
from .training.pretraining import low_rank_plus_sparse
from .training.shared_base import minimise_block_errors, share_bases
from .training.trained_rank_pruning import TrainedRankPruning
from .truncate import truncate

__all__ = [
    "SVD",
    "Activation",
    "ActivationFisher",
    "CompressionReport",
    "DenseLayers",
    "DenseSparseLinear",
    "Dictionary",
    "DictionaryLinear",
    "Factorization",
    "Fisher",
    "LayerReport",
    "LayerStatistics",
    "LowRankCache",
    "LowRankConv",
    "LowRankLinear",
    "LowRankPlusSparseLinear",
    "LowRankTextHead",
    "Method",
    "OneShotDictionary",
    "OrderedLowRankLinear",
    "OrderedRankTraining",
    "SharedBaseLinear",
    "StraightThroughFactorizer",
    "StraightThroughLinear",
    "TrainedRankPruning",
    "cache_bases",
    "calibrate",
    "compress",
    "compress_by_block",
    "dense_sparse",
    "factorize",
    "factorize_conv",
    "factorize_linear",
    "load_compressed",
    "load_factorized",
    "load_statistics",
    "low_rank_plus_sparse",
    "minimise_block_errors",
    "ordered_low_rank",
    "save_compressed",
    "save_statistics",
    "share_bases",
    "straight_through",
    "to_dense",
    "truncate",
]
