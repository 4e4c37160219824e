"""Bases that linear layers of several blocks share: one SVD makes them, and training makes coefficients sparse."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from ...arguments import check_argument
from ...calibration.batches import in_eval_mode, run_model
from ...compiled import on_plain_model
from ...factorized.shared_base_linear import SharedBaseLinear, tie_bases
from ...messages import first_few
from ..replacement import replace_everywhere
from ..solvers.low_rank import Metric, low_rank
from ..statistics.layer_statistics import LayerStatistics, check_finite
from ..targets import check_base, factorizable_weight, linear_layers, reasons_of, separate_replaceable


def shared_rank(width: int, columns: int, budget: float, sparsity: float) -> int:
    """Give r = ⌊d c β / (c (1 − s) + d)⌋, but at most min(d, c), for weights (d, c) that are approximated by U V.

    At this rank the d r numbers of U and the r c (1 − s) values of V that are not zero are a share β of d c.
    """
    rank = int(width * columns * budget / (columns * (1 - sparsity) + width))
    return min(rank, width, columns)


@on_plain_model
@torch.no_grad()
def share_bases(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    budget: float,
    sparsity: float = 0.0,
    statistics: Mapping[str, LayerStatistics] | None = None,
) -> list[int]:
    """Replace the linear layers of each group, in place, by `SharedBaseLinear` layers that share one base.

    Without statistics, each weight is transposed, if necessary, so that the side d that they share is the smaller one.
    Then M = [W_1 … W_g] = U Σ Vᵀ, and the base is U_r: ‖M − U_r U_rᵀ M‖² = Σ_{i>r} σ_i². With statistics, the method
    is that of Basis Sharing (arXiv 2410.03765): the layers share their input side, the base B is the best one for
    Σ_ℓ G_ℓ, the sum of the moments of the layers' inputs, and each layer's coefficients are then fitted with its own
    moment, C_ℓ = W_ℓ G_ℓ B (Bᵀ G_ℓ B)⁻¹. Coefficients are dense at first: `minimise_block_errors` makes them sparse.

    Args:
        model: the model, without adapters.
        groups: for each base the full names of its layers.
        budget: β, the share of the group's weights that base and values may take, after pruning.
        sparsity: s, the share of coefficients that will be zero; bits for places are not counted.
        statistics: the result of `calibrate`.

    Returns:
        The rank of each group.

    Raises:
        ValueError: a share is out of range; the budget is below rank 1; layers do not fit together, do not exist, are
            named twice or are tied; or weights or statistics are missing or not finite. The model is not changed then.
    """
    call = "share_bases(model, groups, budget)"
    check_argument(call, "model", model, "an nn.Module")
    check_argument(call, "budget", budget, "a number")
    if not 0 < budget < 1 or not 0 <= sparsity < 1:
        raise ValueError(
            f"budget={budget!r} must be between 0 and 1, and sparsity={sparsity!r} at least 0 and below 1."
        )
    check_base(model)
    layers = linear_layers(model)
    names = [name for group in groups for name in group]
    missing = [repr(name) for name in names if name not in layers]
    if missing or len({id(layers[name]) for name in names}) < len(names) or not names:
        raise ValueError(f"groups must name linear layers of the model, each once: {first_few(missing) or names}.")
    _, left = separate_replaceable(model, {name: layers[name] for name in names})
    if left:
        raise ValueError(f"Layers cannot share a base. {reasons_of(left)}. Untie or leave them out.")
    made: dict[nn.Module, nn.Module] = {}
    ranks = []
    # Numbers of bases go on from an earlier call, so that each base of the model has its own.
    before = max((layer.number for layer in model.modules() if isinstance(layer, SharedBaseLinear)), default=0)
    for number, group in enumerate(groups, before + 1):
        weights = [factorizable_weight(name, layers[name]) for name in group]
        moments = None if statistics is None else [_moment(name, statistics) for name in group]
        turned = [moments is not None or len(weight) > weight.shape[1] for weight in weights]
        oriented = [weight.T if is_turned else weight for weight, is_turned in zip(weights, turned, strict=True)]
        width, columns = len(oriented[0]), sum(weight.shape[1] for weight in oriented)
        for name, weight in zip(group, oriented, strict=True):
            if len(weight) != width:
                raise ValueError(
                    f"{name!r} has {len(weight)} rows to share, and {group[0]!r} {width}: no base fits both."
                )
        rank = shared_rank(width, columns, budget, sparsity)
        if rank < 1:
            raise ValueError(f"budget={budget} is below rank 1 of the group of {group[0]!r}. Give more.")
        base, coefficients = _solved(oriented, rank, moments)
        parameter = nn.Parameter(base.to(weights[0].dtype).contiguous())
        for name, part, is_turned in zip(group, coefficients, turned, strict=True):
            made[layers[name]] = _layer(layers[name], parameter, part, is_turned, number)
        ranks.append(rank)
    replace_everywhere(model, made)
    tie_bases(model)
    return ranks


def _moment(name: str, statistics: Mapping[str, LayerStatistics]) -> Tensor:
    entry = statistics.get(name)
    if entry is None or entry.moment is None:
        raise ValueError(f"statistics have no inputs of {name!r}: calibrate with it among target_modules.")
    check_finite(name, entry)
    return entry.moment.double()


def _solved(weights: list[Tensor], rank: int, moments: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Give the base U, (d, r), and the coefficients V, (r, c), of each weight, (d, c), in float64."""
    sizes = [weight.shape[1] for weight in weights]
    if moments is None:
        left, values, right = torch.linalg.svd(torch.cat(weights, 1).double(), full_matrices=False)
        return left[:, :rank], list(torch.split(values[:rank, None] * right[:rank], sizes, 1))
    moments = [moment.to(weights[0].device) for moment in moments]
    together = torch.stack(moments).sum(0)
    base = low_rank(torch.cat(weights, 1).T, rank, Metric(together)).down.T
    fitted = []
    for weight, moment in zip(weights, moments, strict=True):
        # The coefficients of least error for the layer's own moment. `pinv` also serves a moment that is singular.
        inner = base.T @ moment @ base
        fitted.append(torch.linalg.pinv(inner, hermitian=True) @ (base.T @ moment @ weight.double()))
    return base, fitted


def _layer(old: nn.Linear | Conv1D, base: nn.Parameter, part: Tensor, turned: bool, number: int) -> SharedBaseLinear:
    new = SharedBaseLinear(base, part.shape[1], turned, old.bias is not None, number)
    new.values.copy_(part.flatten())
    if old.bias is not None:
        new.bias = old.bias
    return new.train(old.training)


def cubic_sparsity(progress: float, start: float, end: float) -> float:
    """Give s = s_end + (s_start − s_end)(1 − progress)³, and s_end for progress > 1 (gradual magnitude pruning)."""
    return end + (start - end) * (1 - min(progress, 1.0)) ** 3


@torch.no_grad()
def prune_together(
    layers: Collection[SharedBaseLinear], sparsity: float, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Drop the smallest values among all layers, until a share `sparsity` of all coefficients is zero.

    Each layer keeps at least its largest value.
    """
    total = sum(layer.rank * layer.columns for layer in layers)
    magnitudes = torch.cat([layer.values.detach().abs() for layer in layers])
    drop = len(magnitudes) - round((1 - sparsity) * total)
    if drop <= 0:
        return
    order = magnitudes.argsort(stable=True)
    kept = torch.ones_like(magnitudes, dtype=torch.bool)
    kept[order[:drop]] = False
    for layer, own in zip(layers, torch.split(kept, [len(layer.values) for layer in layers]), strict=True):
        own[layer.values.detach().abs().argmax()] = True
        layer.prune(own, optimizer)


@on_plain_model
def minimise_block_errors(
    model: nn.Module,
    reference: nn.Module,
    blocks: Sequence[str],
    batches: Iterable[Any],
    *,
    epochs: int = 20,
    lr: float = 1e-4,
    weight_decay: float = 0.05,
    sparsity: float = 0.0,
    initial_sparsity: float = 0.05,
    interval: int = 50,
) -> list[float]:
    """Train shared bases and coefficients so that each block gives the outputs of the original block.

    The loss is Σ_blocks MSE(block of the model, block of the reference). Both blocks get the input that the block of
    the reference has. Every `interval` steps the smallest coefficients among all layers are dropped; the sparsity s
    grows by `cubic_sparsity` during the first three quarters of the steps. The optimizer is AdamW with a cosine
    schedule. Default values are those of the code of FiPS, arXiv 2411.09816, for DeiT. FiPS later trains the model end
    to end; for that, use any training of the model.

    Args:
        model: the model, with `SharedBaseLinear` layers. They are trained in place, in evaluation mode.
        reference: the model as it was before `share_bases`.
        blocks: names of blocks: modules whose first output is a tensor.
        batches: mappings, sequences or tensors, as in `calibrate`.
        epochs, lr, weight_decay: settings of the training.
        sparsity: s at the end.
        initial_sparsity: s at the first pruning.
        interval: number of steps from one pruning to the next.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: the model has no such layer, there are no batches, a block did not run, or a number is out of its
            range.
    """
    call = "minimise_block_errors(model, reference, blocks, batches)"
    check_argument(call, "model", model, "an nn.Module")
    check_argument(call, "reference", reference, "an nn.Module")
    check_argument(call, "batches", batches, "an iterable of batches")
    if not 0 <= sparsity < 1 or epochs < 1 or interval < 1:
        raise ValueError(
            f"sparsity={sparsity!r} must be in [0, 1), epochs={epochs!r}, interval={interval!r} at least 1."
        )
    layers = [module for module in model.modules() if isinstance(module, SharedBaseLinear)]
    kept = list(batches)
    if not layers or not kept:
        raise ValueError("The model has no SharedBaseLinear, call share_bases first; or there are no batches.")
    # Several layers have the same base, which the optimizer must have once.
    parameters = list({id(value): value for layer in layers for value in layer.parameters()}.values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    steps = epochs * len(kept)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    with in_eval_mode(model), in_eval_mode(reference), torch.enable_grad():
        for epoch in range(epochs):
            total = 0.0
            for index, batch in enumerate(kept):
                step = epoch * len(kept) + index
                if sparsity and step % interval == 0:
                    reached = cubic_sparsity(step / (0.75 * steps), min(initial_sparsity, sparsity), sparsity)
                    prune_together(layers, reached, optimizer)
                loss = _block_loss(model, reference, blocks, batch)
                # `backward` would also leave gradients in the model's other parameters.
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            losses.append(total / len(kept))
        if sparsity:  # a short training may have ended between two prunings
            prune_together(layers, sparsity)
    for parameter in parameters:
        parameter.grad = None
    return losses


def _block_loss(model: nn.Module, reference: nn.Module, blocks: Sequence[str], batch: Any) -> Tensor:
    calls: dict[str, tuple[Any, Any, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # A cache holds the reference's keys by now. The model's block would add its own keys to them.
            kwargs = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
            calls[name] = args, kwargs, _tensor(output)

        return hook

    handles = [reference.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in blocks]
    try:
        with torch.no_grad():
            run_model(reference, send_to_device(batch, next(reference.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    silent = [repr(name) for name in blocks if name not in calls]
    if silent:
        raise ValueError(f"{first_few(silent)} did not run in a batch. Name blocks that every batch uses.")
    total = [
        nn.functional.mse_loss(_tensor(model.get_submodule(name)(*args, **kwargs)), wanted)
        for name, (args, kwargs, wanted) in calls.items()
    ]
    return torch.stack(total).sum()


def _tensor(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
