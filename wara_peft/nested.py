"""Nested adapters: the first k components as an adapter, a penalty that empties the last ones, and cutting these.

Source: ordered dropout, hierarchical group lasso and progressive shrinking of Maestro, arXiv 2308.14929.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_argument
from .config import WaRAConfig
from .forms import OrderedFactor, SubbandFactor
from .layers.base import WaRALayer
from .layers.lookup import layers_of
from .linear_algebra.tails import group_lasso, moments_of, tails, worthy
from .training.components import config_of, keep_components, subband_of


def set_rank(model: nn.Module, adapter_name: str, rank: int | None) -> None:
    """Let each module compute with the first `rank` components of an adapter alone; None is all.

    Nothing is lost: the others come back with a larger rank, and saving saves them. Merging and exporting go by what
    is computed. A module that has no more than that keeps all it has.

    Raises:
        ValueError: the adapter was trained without `ordered_dropout`, is merged, or the rank is less than 1.
    """
    layers = ordered_layers(model, adapter_name)
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank!r} must be at least 1; None is all components.")
    merged = [repr(name) for name, layer in layers.items() if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(f"Adapter {adapter_name!r} is merged into module {merged[0]}. Unmerge it first.")
    for layer in layers.values():
        for factor in layer.factors(adapter_name):
            if isinstance(factor, OrderedFactor):
                factor.set_limit(rank)


def rank_penalty(model: nn.Module, adapter_name: str = "default") -> Tensor:
    """λ Σ_modules Σ_{b<R} (‖A[b:]‖_F + ‖B[:, b:]‖_F), over the coefficients of components in order of importance.

    λ is `WaRAConfig.rank_penalty`. The model adds this to the loss that it returns in training; where the loss is
    computed outside of the model, add it there.

    Raises:
        ValueError: the adapter was trained without `ordered_dropout`.
    """
    check_argument("rank_penalty(model, adapter_name)", "model", model, "an nn.Module")
    layers = ordered_layers(model, adapter_name)
    total = group_lasso(tail for layer in layers.values() for tail in _tails(layer, adapter_name))
    return config_of(model, adapter_name).rank_penalty * total


@torch.no_grad()
def shrink_ranks(
    model: nn.Module,
    threshold: float,
    adapter_name: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, int]:
    """Empty the last components: each module keeps the longest prefix with ‖A[b:]‖ · ‖B[:, b:]‖ ≥ threshold.

    Both sides of a component that goes become zero, with the optimizer's moments of them, so that it has no gradient,
    and does not come back. Shapes stay; `cut_ranks` cuts what is empty.

    Args:
        model: the model with the adapter.
        threshold: ε; a component b is kept where any one from b on is worth it.
        adapter_name: the adapter, trained with `ordered_dropout`.
        optimizer: that trains it.

    Returns:
        How many components each module keeps.

    Raises:
        ValueError: the adapter was trained without `ordered_dropout`, or the threshold is negative.
    """
    call = "shrink_ranks(model, threshold)"
    check_argument(call, "model", model, "an nn.Module")
    check_argument(call, "threshold", threshold, "a number")
    layers = ordered_layers(model, adapter_name)
    if threshold < 0:
        raise ValueError(f"threshold={threshold!r} must be at least 0.")
    config = config_of(model, adapter_name)
    kept = {}
    for name, layer in layers.items():
        rows, columns = _tails(layer, adapter_name)
        kept[name] = worthy(rows, columns, threshold)
        for row in config.order_of(name)[kept[name] :]:
            band, index = subband_of(layer.factors(adapter_name)[0], row)
            for factor in layer.factors(adapter_name):
                for tensor in (factor.subband(band), *_moments(factor, band, optimizer)):
                    tensor.select(1 - factor.dim, index).zero_()
    return kept


@torch.no_grad()
def cut_ranks(model: nn.Module, adapter_name: str = "default") -> None:
    """Cut the components whose column of B is zero, in place.

    Raises:
        ValueError: all are, or see `keep_components`.
    """
    config_of(model, adapter_name)
    kept: dict[str, dict[str, list[int]]] = {}
    for name, layer in layers_of(model, adapter_name).items():
        _, factor_b = layer.factors(adapter_name)
        found = {band: factor_b.subband(band).any(0).nonzero().flatten().tolist() for band in factor_b.ranks}
        kept[name] = {band: indices for band, indices in found.items() if indices}
    keep_components(model, adapter_name, kept)


def add_penalty(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
    """Forward hook of a base model: add the penalties of its active adapters to the loss of a training forward.

    Where the loss is a part of that of a larger batch, as `Trainer` has it when it accumulates gradients, so is the
    penalty.
    """
    if not (model.training and torch.is_grad_enabled()):
        return outputs
    loss = outputs.get("loss") if isinstance(outputs, dict) else None
    if isinstance(loss, Tensor):
        for adapter_name in _penalised(model):
            loss = loss + _share(model, kwargs) * rank_penalty(model, adapter_name).to(loss)
        outputs["loss"] = loss
    return outputs


def _share(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """What part of `num_items_in_batch`, by which transformers' models divide their loss, these labels are."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    if "shift_labels" in kwargs:
        labels = kwargs["shift_labels"]
    elif getattr(model, "loss_type", None) == "ForCausalLM":
        labels = labels[..., 1:]
    share: Tensor = labels.ne(-100).sum() / items
    return share


def _penalised(model: nn.Module) -> Iterator[str]:
    active = {name for module in model.modules() if isinstance(module, WaRALayer) for name in module.active_adapters}
    for name, config in getattr(model, "peft_config", {}).items():
        if isinstance(config, WaRAConfig) and config.rank_penalty and name in active and layers_of(model, name):
            yield name


def ordered_layers(model: nn.Module, adapter_name: str) -> dict[str, WaRALayer]:
    """The layers of an adapter whose components have an order."""
    if not config_of(model, adapter_name).ordered_dropout:
        raise ValueError(
            f"Adapter {adapter_name!r} was trained without ordered_dropout=True, and has no first components. "
            "`save_as_lora(rank=...)` gives the best approximation of a lower rank."
        )
    return layers_of(model, adapter_name)


def _moments(factor: SubbandFactor, band: str, optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """A subband's part of what an optimizer keeps of its level's parameter, in that shape."""
    parameter = factor.get_parameter(f"level{band[2:]}")
    for value in moments_of(optimizer, parameter):
        yield factor.part(band, value)


def _tails(layer: WaRALayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """‖A[b:]‖² and ‖B[:, b:]‖² for b = 0 … R − 1, in order of importance."""
    found = []
    factor_a, factor_b = layer.factors(adapter_name)
    assert isinstance(factor_a, OrderedFactor)
    for factor in (factor_a, factor_b):
        norms = [factor.subband(band).transpose(0, 1 - factor.dim).flatten(1).square().sum(1) for band in factor.ranks]
        found.append(tails(torch.cat(norms)[list(factor_a.order)]))
    return found[0], found[1]
