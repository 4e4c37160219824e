"""`compress_by_block`: compresses a saved model block by block, for models larger than memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...arguments import check_argument
from ...calibration.processes import processes
from ...disk.checkpoints.checkpoint import Checkpoint, read_json
from ...disk.checkpoints.directory import written_at_once
from ...messages import first_few
from ..compress import Plan, check_method, check_plan
from ..methods import Method
from ..report import CompressionReport
from ..solvers.table import solver_of
from ..statistics.collect import bytes_needed, limit_of
from .base import dense_base
from .blockwise_model import block_list
from .blockwise_run import INPUTS, Run


def compress_by_block(
    base: str | os.PathLike[str],
    path: str | os.PathLike[str],
    method: Method,
    batches: Iterable[Any] | None = None,
    *,
    sequential: bool = False,
    blocks: str | None = None,
    max_bytes: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> CompressionReport:
    """Compress a saved model of transformers with the weights of one block in memory, and save it.

    It does what `calibrate`, `compress` and `save_compressed` do together, for methods that need statistics of inputs
    only and models with one list of blocks. First, what lies before the blocks runs once for each batch. Then block by
    block: its tensors are read from the checkpoint, its statistics are measured, its layers are factorised, and its
    outputs, the inputs of the next block, are written to files. So the batches go through the model once. Greedy ranks
    need what each rank gains in all layers, so with the allocations "greedy" and "cost" a first pass measures only
    this, and the batches go through the model twice.

    Files of work lie in the directory `path` + ".unfinished": the blocks' inputs and the blocks that are done. If the
    process is interrupted or killed, the next call with the same arguments goes on with the first block that is not
    done, with the batches that were stored then.

    Args:
        base: directory of the model, with safetensors.
        path: directory to write; its files appear together, when all are complete.
        method: as in `compress`; one that needs no gradients, and not with allocation="depth".
        batches: as in `calibrate`; `SVD` needs none.
        sequential: whether each layer's statistics are measured with inputs from layers that are compressed already.
        blocks: name of the list of blocks; needed only if the model has several.
        max_bytes: how much memory the sums of statistics may take. A block whose layers need more runs several times.
            None means 2 GiB, or what the largest layer needs, if that is more.
        device: where blocks run.
        overwrite: replace `path` if it is there.
        show_progress_bar: show progress over blocks.

    Raises:
        FileNotFoundError: a file is missing, or the weights are only there as pickles, which are not opened.
        ValueError: `calibrate` or `compress` would raise it; the method needs gradients; the model has no list of
            blocks, or blocks that get more from each other than hidden states; or files of work are of a call with
            other arguments.
    """
    call = "compress_by_block(base, path, Activation(budget=0.6), batches)"
    check_argument(call, "base", base, "a str or os.PathLike")
    check_method(call, method)
    needs = solver_of(method).needs
    if not set(needs) <= set(INPUTS):
        raise ValueError(
            f"{type(method).__name__} needs gradients, which go through the whole model, not block by block. Use "
            "Activation, Dictionary, OneShotDictionary or SVD, or load the model, and call calibrate and compress."
        )
    if batches is not None:
        check_argument(call, "batches", batches, "an iterable of batches")
    elif needs or sequential:
        raise ValueError(f"{'sequential' if sequential else type(method).__name__} needs batches.")
    if method.allocation == "depth":
        raise ValueError("allocation='depth' compares the weights of all blocks; use 'uniform' or 'greedy' by block.")
    if processes() > 1:
        raise ValueError("compress_by_block runs in one process; calibrate runs in several.")
    directory = Path(base)
    skeleton, empty = dense_base(directory)
    plan = Plan(empty, method)
    if plan.needs_gains:
        check_plan(empty, method)
    else:
        for name in plan.targets:
            plan.add(name, 1, batches is not None, [])
        plan.ranked()  # this refuses a budget that is too small
    place = block_list(empty, plan.targets, blocks)
    outside = [repr(name) for name in plan.targets if not name.startswith(f"{place}.")]
    if sequential and outside:
        raise ValueError(
            f"sequential compresses layer after layer in {place!r}, and {first_few(outside)} lies outside. Leave it "
            "out of target_modules."
        )
    if batches is not None:
        max_bytes = limit_of(max_bytes, {name: bytes_needed(layer, INPUTS) for name, layer in plan.targets.items()})
    work = Path(f"{os.path.realpath(path)}.unfinished")
    with written_at_once(path, "replace" if overwrite else "refuse", inputs=(base,)) as temporary:
        _claim(work, skeleton.checkpoint, method, batches, sequential, place)
        run = Run(directory, empty, plan, place, work, batches is not None, sequential, max_bytes or 0, device)
        report = run.to_end(batches or (), temporary, show_progress_bar)
    shutil.rmtree(work)
    return report


def _claim(
    work: Path, checkpoint: Checkpoint, method: Method, batches: Iterable[Any] | None, sequential: bool, place: str
) -> None:
    """Make the directory of work, or check that it is of a call with these arguments.

    Raises:
        ValueError: it is of another call.
    """
    files = [checkpoint.base / name for name in sorted(set(checkpoint.file_of.values()))]
    now = {
        "method": repr({**dataclasses.asdict(method), "solver": method.solver}),
        "sequential": sequential,
        "blocks": place,
        "base": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        # Only a list can be read twice; other batches are those of the first call.
        "batches": _digest(batches) if isinstance(batches, Sequence) else None,
    }
    record = work / "arguments.json"
    if record.is_file():
        before = read_json(record)
        other = [repr(name) for name in now if before.get(name) != now[name]]
        if other:
            raise ValueError(
                f"{str(work)!r} holds unfinished work with other arguments: {first_few(other)}. Call with those, or "
                "remove the directory."
            )
        return
    work.mkdir(exist_ok=True)
    record.write_text(json.dumps(now), encoding="utf-8")


def _digest(value: Any) -> str:
    found = hashlib.sha256()
    if isinstance(value, Tensor):
        found.update(repr((value.dtype, tuple(value.shape))).encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.items() if isinstance(value, Mapping) else value:
            found.update(_digest(item).encode())
    else:
        found.update(repr(value).encode())
    return found.hexdigest()
