"""Compressing a saved model: reads a model, its tokenizer and a file of texts, and writes a compressed model."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from ...disk.checkpoints.checkpoint import copy_beside
from ...disk.checkpoints.directory import written_at_once
from ..compress import check_method, check_plan, compress
from ..methods import Method
from ..report import CompressionReport, Evaluation
from ..solvers.table import solver_of
from ..statistics.collect import calibrate
from ..statistics.layer_statistics import MANIFEST, load_statistics
from .base import dense_base
from .by_block import compress_by_block
from .evaluation import accuracy, perplexity
from .model import write_compressed
from .text_batches import Batch, TextBatches
from .text_files import read_texts


def compress_checkpoint(
    base: str | os.PathLike[str],
    path: str | os.PathLike[str],
    method: Method,
    *,
    texts: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    sequential: bool = False,
    evaluate: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    length: int = 512,
    batches: int | None = None,
    max_bytes: int | None = None,
    by_block: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> CompressionReport:
    """Calibrate, compress and save a model, with its tokenizer.

    Args:
        base: directory of the model, with safetensors.
        path: directory to write; its files appear together, when all are complete.
        method: as in `compress`.
        texts: a file for calibration with one text in each line; or JSON lines (.jsonl) or CSV with a column "text",
            and for a classifier of texts a column "label" with names or ids of classes. `Fisher` and
            `ActivationFisher` need a loss, which is that of the labels, or of a language model's own tokens.
        statistics: a directory of statistics. If it has some, they are used; otherwise new ones are written to it.
        sequential: whether to measure statistics again, with the same texts, as layers are compressed.
        evaluate: another such file. The perplexity of a language model, or the accuracy of a classifier, is measured
            with it before and after, and reported.
        batch_size, length: how many texts run together, and how many tokens of each are used at most. Texts of a
            decoder are packed into blocks of `length` tokens; see `TextBatches`.
        batches: how many batches to use at most.
        max_bytes: as in `calibrate`.
        by_block: whether to go by `compress_by_block`, with the weights of one block in memory. It keeps no
            statistics, and evaluates nothing.
        device: where the model runs.
        overwrite: replace `path` if it is there.
        show_progress_bar: show progress.

    Raises:
        FileNotFoundError: a file is missing, or the weights are only there as pickles, which are not opened.
        ValueError: `calibrate` or `compress` raised it; the model is compressed already, or has no tokenizer; or the
            method needs texts, or texts with labels, and there are none.
    """
    check_method("compress_checkpoint(base, path, Activation(budget=0.6))", method)
    directory = Path(base)
    # All checks up to `from_pretrained` read only headers, configs and texts, so mistakes show before the weights are
    # loaded.
    if by_block and (statistics is not None or evaluate is not None):
        raise ValueError(
            f"by_block has neither all statistics nor the whole model at any time: leave out "
            f"{'statistics' if statistics is not None else 'evaluate'}."
        )
    skeleton, empty = dense_base(directory)
    model_class = type(empty)
    check_plan(empty, method)
    needs = solver_of(method).needs
    kept = None
    if statistics is not None and (Path(statistics) / MANIFEST).is_file():
        kept = load_statistics(statistics)
    if texts is None and (sequential or (needs and kept is None)):
        why = "sequential" if sequential else f"solver={method.solver!r}"
        raise ValueError(f"{why} needs texts to calibrate with: give a file with one in each line (--texts).")
    if by_block:
        unlabelled = None
        if texts is not None:
            make = TextBatches(directory, skeleton.config, model_class, batch_size, length)
            # With labels the model would compute a loss, which nothing needs here.
            unlabelled = [
                {name: tensor for name, tensor in batch.items() if name != "labels"}
                for batch in itertools.islice(make(read_texts(Path(texts))), batches)
            ]
        return compress_by_block(
            base,
            path,
            method,
            unlabelled,
            sequential=sequential,
            max_bytes=max_bytes,
            device=device,
            overwrite=overwrite,
            show_progress_bar=show_progress_bar,
        )
    with written_at_once(path, "replace" if overwrite else "refuse", inputs=(base,)) as temporary:
        data: list[Batch] = []
        judged: list[Batch] = []
        if texts is not None or evaluate is not None:
            make = TextBatches(directory, skeleton.config, model_class, batch_size, length)
        if texts is not None:
            found_texts = read_texts(Path(texts))
            if kept is None and not {"gradients", "fisher"}.isdisjoint(needs):
                make.check_loss(found_texts, f"solver={method.solver!r}")
            data = list(itertools.islice(make(found_texts), batches))
        if evaluate is not None:
            judged_texts = read_texts(Path(evaluate))
            make.check_loss(judged_texts, "evaluate")
            if make.classifies and make.is_regression:
                raise ValueError(f"evaluate counts right classes, and {model_class.__name__} estimates a number.")
            judged = list(make(judged_texts))
        model = cast(Any, model_class).from_pretrained(directory, local_files_only=True, use_safetensors=True)
        model.to(device)
        before = _score(model, make, judged) if judged else None
        found = kept
        if found is None and data:
            found = calibrate(
                model,
                data,
                # Methods without inputs use their mean all the same, to compensate the bias.
                needs if "inputs" in needs else (*needs, "inputs"),
                target_modules=method.target_modules,
                max_bytes=max_bytes,
                path=statistics,
                show_progress_bar=show_progress_bar,
            )
        report = compress(
            cast(nn.Module, model),
            method,
            found,
            sequential=data if sequential else None,
            show_progress_bar=show_progress_bar,
        )
        if before is not None:
            metric = "accuracy" if make.classifies else "perplexity"
            report = replace(report, evaluation=Evaluation(metric, before, _score(model, make, judged)))
            model.compression_report = report
        copy_beside(directory, temporary)
        write_compressed(model, temporary)
    return report


def _score(model: nn.Module, make: TextBatches, batches: list[Batch]) -> float:
    if make.classifies:
        return accuracy(model, batches)
    return perplexity(model, batches, is_shifted=bool(make.config.is_encoder_decoder))
