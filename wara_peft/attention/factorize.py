"""Factorise the linear layers and attentions of a whole model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from .low_rank import LowRankMultiheadAttention
from .low_rank_linear import LowRankLinear, Solver, check_solver, factorize_linear, linear_shape, resolve_rank

Factorizable = nn.Linear | Conv1D | nn.MultiheadAttention


@dataclass(frozen=True)
class Factorization:
    """What `factorize` did.

    Attributes:
        replaced: rank of each layer that was factorised, by its name.
        left: why a target was left as it is, by its name.
        parameters_before, parameters_after: of the whole model, shared ones counted once.
    """

    replaced: dict[str, int]
    left: dict[str, str]
    parameters_before: int
    parameters_after: int


def factorize(
    model: nn.Module,
    rank: int | float,
    solver: Solver = "svd",
    target_modules: str | list[str] | None = None,
) -> Factorization:
    """Replace linear layers of a model, in place, by two smaller ones each, where that saves parameters.

    An `nn.Linear(n, m)` or a transformers `Conv1D` becomes a `LowRankLinear` of r (m + n) weights; an
    `nn.MultiheadAttention` becomes a `LowRankMultiheadAttention` as a whole. Left as they are, and listed in the
    result: layers where r is at or above the break-even m n / (m + n), and layers whose weight other modules use too
    (a head tied to the embedding), which would go on to exist. Nothing is changed before all replacements are made.

    A factorised model trains as before. To load its state dict, factorise a model of the same architecture in the same
    way first (`solver="random"` is quick) and call `load_state_dict`; `from_pretrained` does not know of the factors.
    Adapters go on after factorising. Source: Cahyawijaya et al., "Greenformers", arXiv 2108.10808.

    Args:
        model: any module that contains linear layers.
        rank: rank of all layers, or a float in (0, 1]: of each layer that fraction of its break-even.
        solver: "svd" keeps as much of the weights as the rank allows, "random" draws them anew; see
            `factorize_linear`.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all.

    Raises:
        ValueError: a wrong rank or solver, a target that matches nothing, a layer that cannot be factorised
            (quantized, on the meta device, not finite; the message has its name), a model with PEFT adapters, or a
            model that is itself a linear layer.
    """
    check_solver(solver)
    resolve_rank(rank, 1, 1)
    if isinstance(model, (nn.Linear, Conv1D, nn.MultiheadAttention)):
        raise ValueError(
            f"model is itself a {type(model).__name__}, which cannot be replaced in place; use factorize_linear or "
            "LowRankMultiheadAttention.from_multihead."
        )
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ValueError(f"{name!r} has a PEFT adapter; merge and unload it, factorise, then add adapters.")

    targets = _targets(model, target_modules)
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    parameters_before = sum(parameter.numel() for parameter in model.parameters())
    factorized: dict[int, LowRankLinear | LowRankMultiheadAttention] = {}  # by the id of the module replaced
    replaced: dict[str, int] = {}
    left: dict[str, str] = {}
    for name, module in targets.items():
        in_features, out_features = _shape(module)
        layer_rank = resolve_rank(rank, in_features, out_features)
        if layer_rank * (in_features + out_features) >= in_features * out_features:
            left[name] = (
                f"rank {layer_rank} saves nothing: the break-even of ({out_features}, {in_features}) is "
                f"{in_features * out_features / (in_features + out_features):.1f}"
            )
        elif any(owners[id(weight)] > 1 for weight in module.parameters()):
            left[name] = "its weight is tied to that of another module, which would keep it"
        else:
            if id(module) not in factorized:
                factorized[id(module)] = _factorized(name, module, rank, solver)
            replaced[name] = layer_rank

    for name in replaced:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, factorized[id(targets[name])])
    if any(isinstance(module, LowRankMultiheadAttention) for module in factorized.values()):
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                # Its fused path in eval mode reads the weights that PyTorch's own attention has.
                module.use_nested_tensor = False
    parameters_after = sum(parameter.numel() for parameter in model.parameters())
    return Factorization(replaced, left, parameters_before, parameters_after)


def _shape(module: Factorizable) -> tuple[int, int]:
    """(in, out) features of a linear layer, or of each projection of an attention."""
    return (module.embed_dim, module.embed_dim) if isinstance(module, nn.MultiheadAttention) else linear_shape(module)


def _factorized(
    name: str, module: Factorizable, rank: int | float, solver: Solver
) -> LowRankLinear | LowRankMultiheadAttention:
    try:
        if isinstance(module, nn.MultiheadAttention):
            return LowRankMultiheadAttention.from_multihead(module, rank, solver)
        return factorize_linear(module, rank, solver)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be factorised: {error}") from error


def _targets(model: nn.Module, target_modules: str | list[str] | None) -> dict[str, Factorizable]:
    """The layers that may be replaced and are asked for, by name; a module with several names under each of them."""
    candidates: dict[str, Factorizable] = {}
    inside_attention: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            inside_attention += (f"{name}.",)  # it uses the weight of its out_proj, and does not call it
        if isinstance(module, (nn.Linear, Conv1D, nn.MultiheadAttention)) and not name.startswith(inside_attention):
            candidates[name] = module
    if target_modules is None:
        targets = candidates
    elif isinstance(target_modules, str):
        targets = {name: module for name, module in candidates.items() if re.fullmatch(target_modules, name)}
    else:
        for target in target_modules:
            if not any(_ends_with(name, target) for name in candidates):
                raise ValueError(_no_match(target, candidates))
        targets = {
            name: module
            for name, module in candidates.items()
            if any(_ends_with(name, target) for target in target_modules)
        }
    if not targets:
        raise ValueError(_no_match(target_modules, candidates))
    return targets


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _no_match(target: object, candidates: dict[str, Factorizable]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in candidates})
    return (
        f"target_modules: {target!r} matches no linear layer or attention of the model; names of these end in "
        f"{', '.join(ends) or 'nothing, as there are none'}."
    )
