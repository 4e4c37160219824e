"""Calibration: running batches through a model to measure moments of inputs and of gradients, and Fisher sums."""

from __future__ import annotations

import itertools
import operator
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...arguments import check_argument
from ...calibration.batches import (
    OR_LOSS_FN,
    LossFunction,
    arguments_of,
    groups_within,
    in_eval_mode,
    loss_of,
    run_model,
    with_frozen_parameters,
)
from ...calibration.input_moments import Moments, arguments_by_name, summed_over_processes
from ...calibration.processes import is_first_process, of_first_process, processes
from ...calibration.samples import may_hold_square_mask, refusing_sequence_first, samples_of
from ...compiled import on_plain_model
from ...factorized.low_rank_linear import linear_shape
from ...messages import first_few
from ..targets import check_base, factorizable_weight, linear_targets, reasons_of, separate_usual
from .gradient_sums import GradientSums
from .layer_statistics import LayerStatistics, StatisticsWriter, check_finite, load_statistics, probe_of

KINDS = ("inputs", "gradients", "fisher")
MAX_BYTES = 2**31


@on_plain_model
def calibrate(
    model: nn.Module,
    dataloader: Iterable[Any],
    statistics: Sequence[str] = ("inputs",),
    batches: int | None = None,
    *,
    target_modules: str | list[str] | None = None,
    loss_fn: LossFunction | None = None,
    max_bytes: int | None = None,
    path: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> Mapping[str, LayerStatistics]:
    """Run batches through a model and measure the statistics of its linear layers that `compress` needs.

    Batches run in evaluation mode with all parameters frozen. Afterwards the model is as it was before. Products are
    in float32, or in the dtype of the inputs if that is wider, and sums in float64. Positions that a batch masks by
    `attention_mask` (or `decoder_attention_mask`) do not count in moments.

    In several processes, as `accelerate launch` starts them, each one passes its own batches, and all get the
    statistics of all batches. Numbers of batches may differ. The model must not be wrapped.

    Statistics of gradients are those of the loss of one sample. Each sample of a batch, an entry along dimension 0 of
    its tensors, runs by itself, so results do not depend on how samples are put into batches.

    Args:
        model: the model, of any floating-point dtype, without adapters.
        dataloader: gives batches. A mapping is passed on as keyword arguments, a sequence as positional arguments, and
            a tensor as the only argument.
        statistics: "inputs" for moment and mean of the inputs, "gradients" for the moment of the output's gradients,
            "fisher" for squared gradients of the weight. The last two need a backward pass for each sample; one pass
            serves all.
        batches: how many batches to use at most; None takes all.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all
            linear layers but the output layer or classifier of a model of transformers.
        loss_fn: takes the model and a batch and gives the loss, a scalar; None takes `model(**batch).loss`.
        max_bytes: how much memory the sums may take; None means 2 GiB, or what the largest layer needs, if that is
            more. If all layers together need more, they are split into groups, and the batches run once for each
            group. Then batches are kept in memory; otherwise each one is fetched when the one before it is done.
        path: a directory to keep the statistics in. Each group is written as soon as it is done, and the returned
            mapping reads layer by layer from there. If calibration is interrupted, finished groups stay in the
            directory, and the next call with the same arguments measures only the others. None keeps statistics in
            main memory.
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
    needed = {name: bytes_needed(layer, statistics) for name, layer in targets.items()}
    limit = limit_of(max_bytes, needed)  # this refuses a layer that needs too much before anything is written
    found: dict[str, LayerStatistics] = {}
    with ExitStack() as stack:
        stack.enter_context(_each_sample_once(dataloader))
        writer = None
        if path is not None:
            if is_first_process():
                writer = stack.enter_context(StatisticsWriter(path, statistics))
                found.update(_finished(writer, targets))
            found = of_first_process(found)
            needed = {name: size for name, size in needed.items() if name not in found}
        groups = list(groups_within(limit, needed)) if needed else []
        count = operator.length_hint(dataloader)
        count = min(count, batches or count) * len(groups)
        progress = stack.enter_context(tqdm(total=count or None, desc="Calibrating", disable=not show_progress_bar))
        kept: list[Any] = []
        for index, group in enumerate(groups):
            layers = {name: targets[name] for name in group}
            # Each group of layers must see the same batches. An iterator gives them only once, and a dataloader may
            # shuffle. So batches are kept, but only if there are further groups.
            data = kept if index else _batches(dataloader, batches, kept if len(groups) > 1 else None)
            measured = measure(model, layers, data, statistics, loss_fn, lambda: progress.update())
            if path is None:
                found.update(measured)
            else:
                if writer is not None:
                    writer.add(measured)
                # Counts and shapes are enough for the warning below; the tensors are on disk.
                found.update({name: _without_tensors(entry) for name, entry in measured.items()})
    if "inputs" in statistics:
        warn_of_few(found)
    if path is not None:
        of_first_process(None)  # waits until the files are there
        return load_statistics(path)
    return found


@contextmanager
def _each_sample_once(dataloader: Any) -> Iterator[None]:
    """Context in which a dataloader of accelerate does not repeat samples so that all processes get equally many."""
    sampler: Any = getattr(dataloader, "batch_sampler", None)
    evens_out = isinstance(sampler, BatchSamplerShard) and sampler.even_batches
    try:
        if evens_out:
            sampler.even_batches = False
        yield
    finally:
        if evens_out:
            sampler.even_batches = True


def warn_of_few(found: Mapping[str, LayerStatistics]) -> None:
    """Warn of layers that have seen fewer positions than they have inputs."""
    few = [
        f"{name!r} ({entry.count} positions, {entry.shape[1]} inputs)"
        for name, entry in found.items()
        if 0 < entry.count < entry.shape[1]
    ]
    if few:
        least = max(entry.shape[1] for entry in found.values())
        warnings.warn(
            f"Too few samples for a regular moment of {first_few(few)}: what these layers do elsewhere does not "
            f"count. Calibrate with at least {least} positions, better ten times as many."
        )


def _finished(writer: StatisticsWriter, targets: Mapping[str, nn.Module]) -> dict[str, LayerStatistics]:
    """Give what an interrupted calibration has left, without moments, after a check that it is of these layers.

    Raises:
        ValueError: a layer is none of these targets, or its weight has changed.
    """
    found = {}
    for name in writer.layers:
        found[name] = writer.entry(name)
        layer = cast(Any, targets.get(name))
        if layer is None or not torch.equal(found[name].probe.float(), probe_of(layer.weight)):
            raise ValueError(
                f"path holds unfinished statistics of {name!r}, which is no target, or has other weights now. "
                "Calibrate with the model and arguments of that time, or remove the directory."
            )
    return found


def _batches(dataloader: Iterable[Any], most: int | None, kept: list[Any] | None) -> Iterator[Any]:
    """Give batches as they come, and keep them in a list if there is one.

    Raises:
        ValueError: there are none.
    """
    batch = None
    for batch in itertools.islice(dataloader, most):
        if kept is not None:
            kept.append(batch)
        yield batch
    if batch is None and processes() == 1:  # of several processes, some may get no batch
        raise ValueError("The dataloader gives no batches.")


def measure(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | Conv1D],
    batches: Iterable[Any],
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
    moments, masks = Moments(model), Moments(model)
    differentiates = "gradients" in statistics or "fisher" in statistics
    taps = {name: GradientSums(name, layer, masks, statistics) for name, layer in layers.items()}
    device = next(model.parameters()).device
    # The caller may be in `inference_mode`, whose tensors have no gradients and no counter of in-place changes.
    with torch.inference_mode(False), in_eval_mode(model), with_frozen_parameters(model):
        for batch in batches:
            batch = send_to_device(batch, device)
            if "inputs" in statistics:
                with torch.no_grad(), moments.watching(set(layers.values())):
                    for part in samples_of(model, batch) if may_hold_square_mask(batch) else (batch,):
                        moments.start_batch(arguments_by_name(model, *arguments_of(part)))
                        # `loss_fn` knows how to call the model; the loss itself is not needed.
                        run_model(model, part, OR_LOSS_FN) if loss_fn is None else loss_fn(model, part)
            if differentiates:
                _differentiate(model, batch, layers, taps, masks, loss_fn)
            done()
    sums = summed_over_processes(moments.sums(), {layer: linear_shape(layer)[0] for layer in layers.values()})
    # Layers with the same input, such as q, k and v, have one sum. It is moved to main memory once, and shared there.
    shared: dict[int, tuple[int, Tensor, Tensor]] = {}
    found = {}
    for name, layer in layers.items():
        n, m = linear_shape(layer)
        tap = taps[name]
        of_gradients = tap.results() if differentiates else (None, None)
        count, moment, mean = tap.count, None, None
        if layer in sums:
            total = sums[layer]
            if id(total) not in shared:
                # The sum becomes the moment in place: the moments of a wide layer fill much of the memory.
                moment = total.centred.div_(max(total.count, 1)).addr_(total.mean, total.mean)
                shared[id(total)] = total.count, moment.cpu(), total.mean.cpu()
            count, moment, mean = shared[id(total)]
        found[name] = LayerStatistics((m, n), count, probe_of(layer.weight), moment, mean, *of_gradients)
        check_finite(name, found[name])
    return found


def _differentiate(
    model: nn.Module,
    batch: Any,
    layers: Mapping[str, nn.Module],
    taps: Mapping[str, GradientSums],
    masks: Moments,
    loss_fn: LossFunction | None,
) -> None:
    """Run each sample of a batch forward and backward, so that the layers' sums get its gradients.

    A layer's calls and the dimensions of its inputs do not tell which sample they belong to, and the loss of a batch
    does not tell how it weighs samples. So each sample runs by itself.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(masks.watching(()))
        stack.enter_context(refusing_sequence_first(model))
        for name, tap in taps.items():
            stack.callback(layers[name].register_forward_hook(tap, with_kwargs=True).remove)
        for sample in samples_of(model, batch):
            masks.start_batch(arguments_by_name(model, *arguments_of(sample)))
            loss = loss_of(model, sample, loss_fn)
            # Parameters are frozen, so the loss has a gradient only if a target ran in this sample.
            is_backward = loss.requires_grad and not _is_without_labels(sample, loss)
            for tap in taps.values():
                tap.end_forward()
            if is_backward:
                loss.backward()  # type: ignore[no-untyped-call]
            for tap in taps.values():
                tap.end_sample()


def _is_without_labels(sample: Any, loss: Tensor) -> bool:
    """Whether the loss is 0 / 0, a mean over no tokens, as for a text of one token. Its gradient counts as zero."""
    labels = sample.get("labels") if isinstance(sample, Mapping) else None
    # Of one token's label nothing is left where labels are shifted by one. -100 is the label that losses ignore.
    return isinstance(labels, Tensor) and bool(loss.isnan()) and int((labels != -100).sum()) < 2


def bytes_needed(layer: nn.Linear | Conv1D, statistics: Collection[str]) -> int:
    n, m = linear_shape(layer)
    double = torch.float64.itemsize
    # The sum over earlier calls, the sum over the last call, and its product in float32 are in memory at once.
    of_inputs = (2 * double + double // 2) * n**2 if "inputs" in statistics else 0
    # Up to m gradients, in float32, wait beside the sum.
    of_gradients = (double + double // 2) * m**2 if "gradients" in statistics else 0
    return of_inputs + of_gradients + (double * n if "fisher" in statistics else 0)


def limit_of(max_bytes: int | None, needed: Mapping[str, int]) -> int:
    """Give the memory that sums may take, by default 2 GiB or what the largest layer needs.

    Raises:
        ValueError: a layer needs more than `max_bytes`.
    """
    limit = max([MAX_BYTES, *needed.values()]) if max_bytes is None else max_bytes
    for _ in groups_within(limit, needed):
        pass
    return limit


def _without_tensors(entry: LayerStatistics) -> LayerStatistics:
    return LayerStatistics(entry.shape, entry.count, entry.probe)
