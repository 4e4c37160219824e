"""Pretraining with linear layers of a low-rank and a sparse part."""

from __future__ import annotations

import itertools
from numbers import Real

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...arguments import check_argument, check_whole_number
from ...compiled import on_plain_model
from ...factorized import LowRankPlusSparseLinear
from ..replacement import replace_targets
from ..report import Factorization
from ..targets import check_base, linear_targets, weight_of


@on_plain_model
def low_rank_plus_sparse(
    model: nn.Module,
    rank: int,
    density: float,
    target_modules: str | list[str] | None = None,
    *,
    alpha: int = 16,
    seed: int = 0,
) -> Factorization:
    """Replace linear layers of a model, in place, by new layers W = (α/r) B A + S for pretraining.

    S is sparse, and the places of its values are random and fixed. The old weights are lost: `LowRankPlusSparseLinear`
    draws new values. Biases are kept. All arguments are checked before the model is changed.

    The paper trains with AdamW without weight decay, a learning rate of 3e-3, ranks of a fourth to a half of the
    width, α from 8 to 32 and δ = 0.03 (0.05 for 7B). Embeddings, norms and the head stay dense in it, as they do here
    if `target_modules` is None. Source: Han et al., "SLTrain", arXiv 2406.02214.

    Args:
        model: any module that contains linear layers, `nn.Linear` or transformers' `Conv1D`.
        rank: r, the rank of all layers.
        density: δ, the share of entries for which S has values, which are ⌊δ m n⌋.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all
            linear layers but the output layer or classifier of a model of transformers.
        alpha: α, a whole number.
        seed: seed of the first layer's places; each further layer has the next whole number as its seed.

    Returns:
        A report of the layers that were replaced, and of those left because their weight is tied to another module's.

    Raises:
        ValueError: `density` is not between 0 and 1, or leaves a layer without values; `rank` is at or above the
            break-even (1 − δ) m n / (m + n) of a layer; a target matches nothing, or is quantized, on the meta device
            or not finite; or the model has PEFT adapters.
    """
    check_argument("low_rank_plus_sparse(model, rank, density)", "model", model, "an nn.Module")
    check_whole_number("rank", rank)
    if not isinstance(density, Real) or not 0 < density < 1:
        raise ValueError(
            f"density={density!r} must be a float between 0 and 1: the share of entries of the sparse part. At 0 use "
            "factorize(solver='random'), at 1 the dense model."
        )
    density = float(density)
    check_base(model)
    seeds = itertools.count(seed)

    def make(layer: nn.Linear | Conv1D) -> nn.Module:
        weight = weight_of(layer)
        m, n = weight.shape
        has_bias = layer.bias is not None
        try:
            new = LowRankPlusSparseLinear(
                n, m, rank, int(density * m * n), alpha, has_bias, next(seeds), weight.device, weight.dtype
            )
        except ValueError as error:
            raise ValueError(f"at density={density}: {error}") from error
        if has_bias:
            new.bias = layer.bias
        return new

    return replace_targets(model, linear_targets(model, target_modules), make)
