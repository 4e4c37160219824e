"""Calibration: running batches through a model to measure moments of inputs and of gradients, and Fisher sums."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...arguments import check_argument
from ...calibration.batches import (
    LossFunction,
    arguments_of,
    groups_within,
    in_eval_mode,
    loss_of,
    with_frozen_parameters,
    with_gradient,
)
from ...calibration.input_moments import Moments
from ...compiled import on_plain_model
from ...factorized.low_rank_linear import linear_shape
from ...messages import first_few
from ..targets import check_base, factorizable_weight, linear_targets, reasons_of, separate_usual
from .layer_statistics import LayerStatistics, StatisticsWriter, check_finite, load_statistics, probe_of

KINDS = ("inputs", "gradients", "fisher")
MAX_BYTES = 2**31
MAX_PRODUCTS = 2**22
"""How many products of gradients at two positions are in memory at a time; one sample is never split."""


@on_plain_model
def calibrate(
    model: nn.Module,
    dataloader: Iterable[Any],
    statistics: Sequence[str] = ("inputs",),
    batches: int | None = None,
    *,
    target_modules: str | list[str] | None = None,
    loss_fn: LossFunction | None = None,
    max_bytes: int = MAX_BYTES,
    path: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> Mapping[str, LayerStatistics]:
    """Run batches through a model and measure the statistics of its linear layers that `compress` needs.

    Batches run in evaluation mode with all parameters frozen. Afterwards the model is as it was before. Sums are in
    float32, or in the dtype of the inputs if that is wider. Positions that a batch masks by `attention_mask` (or
    `decoder_attention_mask`) do not count.

    Args:
        model: the model, of any floating-point dtype, without adapters.
        dataloader: gives batches. A mapping is passed on as keyword arguments, a sequence as positional arguments, and
            a tensor as the only argument.
        statistics: "inputs" for moment and mean of the inputs, "gradients" for the moment of the output's gradients,
            "fisher" for squared gradients of the weight. The last two need a backward pass; one pass serves all.
        batches: how many batches to use at most; None takes all.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all
            linear layers but the output layer or classifier of a model of transformers.
        loss_fn: takes the model and a batch and gives the loss, a scalar; None takes `model(**batch).loss`.
        max_bytes: how much memory the sums may take. If all layers together need more, they are split into groups,
            and the batches run once for each group.
        path: a directory to keep the statistics in. Each group is written as soon as it is done, and the returned
            mapping reads layer by layer from there. None keeps statistics in main memory.
        show_progress_bar: show progress over batches.

    Returns:
        Statistics by the names of layers. A layer that never ran has count 0.

    Raises:
        ValueError: there are no batches, a target is quantized, on the meta device or not finite, an argument is out
            of range, the loss is no scalar, or statistics are not finite.

    Warns:
        UserWarning: a layer has seen fewer positions than it has inputs, so that its moment is singular.
    """
    call = "calibrate(model, dataloader, statistics)"
    check_argument(call, "model", model, "an nn.Module")
    check_argument(call, "dataloader", dataloader, "an iterable of batches")
    unknown = [kind for kind in statistics if kind not in KINDS]
    if unknown or not statistics:
        raise ValueError(f"statistics={statistics!r} must be some of {', '.join(map(repr, KINDS))}.")
    if batches is not None and batches < 1:
        raise ValueError(f"batches={batches!r} must be at least 1.")
    check_base(model)
    targets, left = separate_usual(linear_targets(model, target_modules))
    if not targets:
        raise ValueError(f"No layer can be compressed. {reasons_of(left)}. Name others in target_modules.")
    for name, layer in targets.items():
        factorizable_weight(name, layer)
    needed = {name: _bytes_needed(layer, statistics) for name, layer in targets.items()}
    groups = list(groups_within(max_bytes, needed))
    # Each group of layers must see the same batches. An iterator gives them only once, and a dataloader may shuffle.
    kept = list(itertools.islice(dataloader, batches))
    if not kept:
        raise ValueError("The dataloader gives no batches.")
    found: dict[str, LayerStatistics] = {}
    with ExitStack() as stack:
        progress = stack.enter_context(
            tqdm(total=len(groups) * len(kept), desc="Calibrating", disable=not show_progress_bar)
        )
        writer = None
        if path is not None:
            writer = stack.enter_context(StatisticsWriter(path))
        for group in groups:
            layers = {name: targets[name] for name in group}
            measured = measure(model, layers, kept, statistics, loss_fn, lambda: progress.update())
            if writer is None:
                found.update(measured)
            else:
                writer.add(measured)
                # Counts and shapes are enough for the warning below; the tensors are on disk.
                found.update({name: _without_tensors(entry) for name, entry in measured.items()})
    few = [
        f"{name!r} ({entry.count} positions, {entry.shape[1]} inputs)"
        for name, entry in found.items()
        if "inputs" in statistics and 0 < entry.count < entry.shape[1]
    ]
    if few:
        least = max(entry.shape[1] for entry in found.values())
        warnings.warn(
            f"Too few samples for a regular moment of {first_few(few)}: what these layers do elsewhere does not "
            f"count. Calibrate with at least {least} positions, better ten times as many."
        )
    if path is not None:
        return load_statistics(path)
    return found


def measure(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | Conv1D],
    batches: Collection[Any],
    statistics: Collection[str],
    loss_fn: LossFunction | None = None,
    done: Any = lambda: None,
) -> dict[str, LayerStatistics]:
    """Measure the statistics of some layers in one run through the batches, and keep them in main memory.

    Args:
        model, statistics, loss_fn: as in `calibrate`.
        layers: layers by name.
        batches: batches on any device.
        done: called after each batch.

    Raises:
        ValueError: the loss is no scalar, or statistics are not finite.
    """
    moments = Moments(model, with_mean=True)
    differentiates = "gradients" in statistics or "fisher" in statistics
    taps = {name: _GradientSums(name, layer, moments, statistics) for name, layer in layers.items()}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        if differentiates:
            # The caller may be in `inference_mode` or `no_grad`, as `compress` is.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for name, tap in taps.items():
                stack.callback(layers[name].register_forward_hook(tap).remove)
        else:
            stack.enter_context(torch.no_grad())
        stack.enter_context(in_eval_mode(model))
        stack.enter_context(with_frozen_parameters(model))
        stack.enter_context(moments.watching(set(layers.values()) if "inputs" in statistics else ()))
        for batch in batches:
            batch = send_to_device(batch, device)
            args, kwargs = arguments_of(batch)
            moments.start_batch(kwargs)
            if differentiates:
                loss = loss_of(model, batch, loss_fn)
                # Parameters are frozen, so the loss has a gradient only if a target ran in this batch.
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            elif loss_fn is None:
                model(*args, **kwargs)
            else:  # `loss_fn` knows how to call the model; the loss itself is not needed
                loss_fn(model, batch)
            done()
    sums = moments.of_layers()
    # Layers with the same input, such as q, k and v, have one sum. It is moved to main memory once, and shared there.
    shared: dict[int, tuple[int, Tensor, Tensor]] = {}
    found = {}
    for name, layer in layers.items():
        n, m = linear_shape(layer)
        tap = taps[name]
        count, moment, mean = tap.count, None, None
        if layer in sums:
            total = sums[layer]
            if id(total) not in shared:
                # The inputs were summed with a 1 appended, so the last row holds their sum and, at its end, the count.
                count = int(total[-1, -1])
                scale = 1 / max(count, 1)
                shared[id(total)] = count, (total[:-1, :-1] * scale).cpu(), (total[-1, :-1] * scale).cpu()
            count, moment, mean = shared[id(total)]
        of_gradients = tap.results() if differentiates else (None, None)
        found[name] = LayerStatistics((m, n), count, probe_of(layer.weight), moment, mean, *of_gradients)
        check_finite(name, found[name])
    return found


class _GradientSums:
    """Forward hook of a linear layer that sums g gᵀ over positions and Σ_i (∂loss/∂W_ij)² over samples.

    g is the gradient of the loss by the layer's output at one position, and a sample is an entry of the batch.
    """

    def __init__(self, name: str, layer: nn.Linear | Conv1D, moments: Moments, statistics: Collection[str]) -> None:
        self.name, self.moments = name, moments
        n, m = linear_shape(layer)
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        device = layer.weight.device
        self.outer = torch.zeros(m, m, dtype=wide, device=device) if "gradients" in statistics else None
        self.squares = torch.zeros(n, dtype=wide, device=device) if "fisher" in statistics else None
        self.count = self.samples = 0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs: Tensor = args[0].detach()
        # The gradient arrives in the backward pass. A later layer may have overwritten the input by then, which only
        # autograd's version counter shows, as autograd itself does not save inputs of a frozen layer.
        version = inputs._version
        counting = self.moments.counting(layer, inputs)

        def add(gradient: Tensor) -> None:
            if inputs._version != version:
                raise RuntimeError(f"The input of module {self.name!r} is changed in place after use.")
            self._add(inputs, gradient, counting)

        return with_gradient(output, add)

    def _add(self, inputs: Tensor, gradient: Tensor, counting: Tensor | None) -> None:
        samples = len(inputs)
        g = gradient.reshape(samples, -1, gradient.shape[-1])  # (samples, positions, m)
        if counting is not None:
            g = g * counting.reshape(samples, -1, 1)
        self.count += g.shape[0] * g.shape[1] if counting is None else int(counting.sum())
        self.samples += samples
        if self.outer is not None:
            rows = g.flatten(0, 1).to(self.outer.dtype)
            self.outer.addmm_(rows.T, rows)
        if self.squares is not None:
            x = inputs.reshape(samples, -1, inputs.shape[-1])
            together = max(1, MAX_PRODUCTS // g.shape[1] ** 2)
            for some_g, some_x in zip(torch.split(g, together), torch.split(x, together), strict=True):
                # Σ_i (Σ_t g_ti x_tj)² = x_jᵀ (g gᵀ) x_j. So the (m, n) gradients of samples are never in memory.
                some_g, some_x = some_g.to(self.squares.dtype), some_x.to(self.squares.dtype)
                self.squares += torch.bmm(torch.bmm(some_g, some_g.mT), some_x).mul_(some_x).sum((0, 1))

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        return (
            None if self.outer is None else (self.outer / max(self.count, 1)).cpu(),
            None if self.squares is None else (self.squares / max(self.samples, 1)).cpu(),
        )


def _bytes_needed(layer: nn.Linear | Conv1D, statistics: Collection[str]) -> int:
    n, m = linear_shape(layer)
    size = torch.promote_types(layer.weight.dtype, torch.float32).itemsize
    # Three matrices for the inputs are in memory at once: the sum, the products of the last batch, and the new sum.
    of_inputs = 3 * (n + 1) ** 2 if "inputs" in statistics else 0
    of_gradients = m**2 if "gradients" in statistics else 0
    return size * (of_inputs + of_gradients + (n if "fisher" in statistics else 0))


def _without_tensors(entry: LayerStatistics) -> LayerStatistics:
    return LayerStatistics(entry.shape, entry.count, entry.probe)
