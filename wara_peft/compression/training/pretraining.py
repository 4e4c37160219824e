"""Models whose linear layers train as low-rank and sparse parts from the start, and their way back to dense ones."""

from __future__ import annotations

import itertools
from typing import Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...arguments import check_argument, check_whole_number
from ...compiled import on_plain_model
from ...factorized import LowRankPlusSparseLinear
from ...factorized.saved import FACTORIZED
from ...messages import first_few
from ..replacement import replace_everywhere, replace_targets
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
    """Replace linear layers of a model, in place, by W = (α/r) B A + S with a random fixed support, for pretraining.

    What the layers held is given up, but for their biases: factors are drawn as `LowRankPlusSparseLinear` draws them.
    Nothing is changed before all arguments are checked. The paper trains with AdamW without weight decay at a learning
    rate of 3e-3, ranks of a fourth to a half of the width, α 8 to 32 and δ = 0.03 (0.05 for 7B), and keeps embeddings,
    norms and the head dense, as None does here. Source: Han et al., "SLTrain", arXiv 2406.02214.

    Args:
        model: any module that contains linear layers, `nn.Linear` or transformers' `Conv1D`.
        rank: r, of all layers.
        density: δ, the share of entries that S has: ⌊δ m n⌋ values.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all
            linear layers but the output layer of a model of transformers.
        alpha: α, a whole number.
        seed: of the supports; each layer has its own.

    Returns:
        What was replaced, and which layers were left as their weight is tied to others.

    Raises:
        ValueError: a density outside of (0, 1), or one without a value in some layer; a rank from the break-even
            (1 − δ) m n / (m + n) of a layer on; a target that matches nothing or is quantized, on the meta device or
            not finite; or a model with PEFT adapters.
    """
    check_argument("low_rank_plus_sparse(model, rank, density)", "model", model, "an nn.Module")
    check_whole_number("rank", rank)
    if not isinstance(density, float) or not 0 < density < 1:
        raise ValueError(
            f"density={density!r} must be a float between 0 and 1: the share of entries of the sparse part. At 0 use "
            "factorize(solver='random'), at 1 the dense model."
        )
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


@on_plain_model
def to_dense(model: nn.Module) -> list[str]:
    """Replace all factorised layers of a model, in place, by linear layers and convolutions of the same weight.

    For deployment where that is faster or where nothing else is known. A layer that was a `Conv1D` is an `nn.Linear`
    now, so that `from_pretrained` of such a model (GPT-2) does not load it.

    Returns:
        Names of the layers replaced.

    Raises:
        ValueError: there is none, or the model has PEFT adapters.
    """
    check_argument("to_dense(model)", "model", model, "an nn.Module")
    check_base(model)
    names = [name for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, FACTORIZED)]
    if not names:
        kinds = [kind.__name__ for kind in FACTORIZED]
        raise ValueError(f"The model has no factorised layer: no {first_few(kinds, len(kinds))}.")
    layers = {model.get_submodule(name) for name in names}
    made = {layer: cast(Any, layer).dense() for layer in layers}
    replace_everywhere(model, made)
    return names
