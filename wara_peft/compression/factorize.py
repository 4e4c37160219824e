"""Factorise the linear layers and attentions of a whole model."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..arguments import check_argument
from ..attention import LowRankMultiheadAttention
from ..compiled import on_plain_model
from ..factorized.low_rank_linear import Solver, check_solver, factorize_linear, linear_shape, resolve_rank
from ..factorized.saved import use_no_nested_tensors
from .replacement import replace_targets
from .report import Factorization
from .targets import check_base, linear_layers_and_attentions, select_targets

Factorizable = nn.Linear | Conv1D | nn.MultiheadAttention


@on_plain_model
def factorize(
    model: nn.Module,
    rank: int | float,
    solver: Solver = "svd",
    target_modules: str | list[str] | None = None,
) -> Factorization:
    """Replace each linear layer of a model, in place, by two smaller ones, where that saves parameters.

    An `nn.Linear(n, m)` or a transformers `Conv1D` becomes a `LowRankLinear` of r (m + n) weights; an
    `nn.MultiheadAttention` becomes one `LowRankMultiheadAttention`. Three kinds of layers stay as they are and are
    listed in the result: layers whose rank r is at or above the break-even m n / (m + n); layers that share their
    weight with another module (a head tied to the embedding), because that module would keep the weight in memory;
    and unusual layers, whose class computes something else than W x + b or whose weight is parametrized.
    The model is changed only after all replacements were made without an error.

    A factorised model trains as before. What `save_pretrained` writes of a model of transformers, `from_pretrained`
    loads; `load_factorized` loads the state dict of any other model. Adapters go on after factorising. Source:
    Cahyawijaya et al., "Greenformers", arXiv 2108.10808.

    Args:
        model: any module that contains linear layers.
        rank: one rank for all layers, or a float in (0, 1]: each layer then gets that fraction of its break-even.
        solver: "svd" keeps as much of the weights as the rank allows, "random" draws new weights; see
            `factorize_linear`.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all.

    Raises:
        ValueError: `rank` or `solver` is wrong, a target matches nothing, a layer cannot be factorised because it is
            quantized, on the meta device or not finite (the message names it), the model has PEFT adapters, or the
            model is itself a linear layer.
    """
    check_argument("factorize(model, rank)", "model", model, "an nn.Module")
    check_solver(solver)
    resolve_rank(rank, 1, 1)  # refuses a wrong rank before the first layer is looked at
    check_base(model)

    def make(module: Factorizable) -> nn.Module | str:
        n, m = _shape(module)
        layer_rank = resolve_rank(rank, n, m)
        if layer_rank * (n + m) >= n * m:
            return f"rank {layer_rank} saves nothing: the break-even of ({m}, {n}) is {n * m / (n + m):.1f}"
        if isinstance(module, nn.MultiheadAttention):
            return LowRankMultiheadAttention.from_multihead(module, rank, solver)
        return factorize_linear(module, rank, solver)

    done = replace_targets(model, select_targets(linear_layers_and_attentions(model), target_modules), make)
    made = {model.get_submodule(name) for name in done.replaced}
    use_no_nested_tensors(model, {module for module in made if isinstance(module, LowRankMultiheadAttention)})
    return done


def _shape(module: Factorizable) -> tuple[int, int]:
    """Give (in, out) features of a linear layer, or of one projection of an attention."""
    return (module.embed_dim, module.embed_dim) if isinstance(module, nn.MultiheadAttention) else linear_shape(module)
