"""Compressing a saved model: reads a model, its tokenizer and a file of texts, and writes a compressed model."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...disk.checkpoints.checkpoint import Checkpoint, copy_beside
from ...disk.checkpoints.directory import written_at_once
from ...disk.checkpoints.skeleton import Skeleton
from ...factorized.saved import kinds_and_sizes
from ..compress import check_options, compress
from ..report import CompressionReport
from ..solvers.table import SOLVERS
from ..statistics.collect import MAX_BYTES, calibrate
from ..statistics.layer_statistics import MANIFEST, load_statistics
from .model import model_class_of, write_compressed

Batch = dict[str, torch.Tensor]


def compress_checkpoint(
    base: str | os.PathLike[str],
    path: str | os.PathLike[str],
    budget: float | int | str,
    *,
    solver: str = "activation",
    allocation: Literal["uniform", "greedy", "cost", "depth"] = "greedy",
    texts: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    target_modules: list[str] | None = None,
    cost: str = "flops",
    sequential: bool = False,
    batch_size: int = 8,
    length: int = 512,
    batches: int | None = None,
    max_bytes: int = MAX_BYTES,
    device: str = "cpu",
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> CompressionReport:
    """Calibrate, compress and save a model, with its tokenizer.

    Args:
        base: directory of the model, with safetensors.
        path: directory to write; its files appear together, when all are complete.
        budget, solver, allocation, target_modules, cost: as in `compress`.
        texts: a file for calibration with one text in each line.
        statistics: a directory of statistics. If it has some, they are used; otherwise new ones are written to it.
        sequential: whether to measure statistics again, with the same texts, as layers are compressed.
        batch_size, length: how many texts run together, and how many tokens of each are used at most.
        batches: how many batches to use at most.
        max_bytes: as in `calibrate`.
        device: where the model runs.
        overwrite: replace `path` if it is there.
        show_progress_bar: show progress.

    Raises:
        FileNotFoundError: a file is missing, or the weights are only there as pickles, which are not opened.
        ValueError: `calibrate` or `compress` raised it; the model is compressed already, or has no tokenizer; or the
            solver needs texts and there are none.
    """
    check_options(budget, solver, allocation, cost)
    directory = Path(base)
    # All checks up to `written_at_once` read only headers and configs, so mistakes show before the weights are loaded.
    checkpoint = Checkpoint(directory)
    skeleton = Skeleton(checkpoint)
    model_class = model_class_of(skeleton)
    done = kinds_and_sizes(skeleton.make(model_class))
    if done:
        raise ValueError(
            f"{str(base)!r} has {len(done)} factorised layers already. Compress the model it was made of."
        )
    needs = SOLVERS[solver].needs
    kept = statistics is not None and (Path(statistics) / MANIFEST).is_file()
    if texts is None and (sequential or (needs and not kept)):
        why = "sequential" if sequential else f"solver={solver!r}"
        raise ValueError(f"{why} needs texts to calibrate with: give a file with one in each line (--texts).")
    with written_at_once(path, "replace" if overwrite else "refuse", inputs=(base,)) as temporary:
        data: list[Batch] = []
        if texts is not None:
            lines = read_texts(Path(texts))
            every = text_batches(directory, skeleton.config, model_class.__name__, lines, batch_size, length)
            data = list(itertools.islice(every, batches))
        model = cast(Any, model_class).from_pretrained(directory, local_files_only=True, use_safetensors=True)
        model.to(device)
        found = None
        if kept:
            found = load_statistics(cast(Any, statistics))
        elif data:
            found = calibrate(
                model,
                data,
                # Solvers without inputs use their mean all the same, to compensate the bias.
                needs if "inputs" in needs else (*needs, "inputs"),
                target_modules=target_modules,
                max_bytes=max_bytes,
                path=statistics,
                show_progress_bar=show_progress_bar,
            )
        report = compress(
            cast(nn.Module, model),
            budget,
            solver,
            found,
            allocation,
            target_modules=target_modules,
            cost=cost,
            sequential=data if sequential else None,
            show_progress_bar=show_progress_bar,
        )
        copy_beside(directory, temporary)
        write_compressed(model, temporary)
    return report


def read_texts(path: Path) -> list[str]:
    """Give the lines of a file that are not empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not text, or has only empty lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not text in UTF-8: {error}.") from error
    if not lines:
        raise ValueError(f"{str(path)!r} has no texts: give a file with one in each line.")
    return lines


def text_batches(
    directory: Path, config: PreTrainedConfig, class_name: str, texts: Sequence[str], batch_size: int, length: int
) -> Iterator[Batch]:
    """Give tokens and masks of texts in batches, with the tokens as labels if the model predicts them.

    Raises:
        ValueError: `directory` has no tokenizer that can be loaded.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds where files are missing or broken
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{str(directory)!r} has no tokenizer: {type(error).__name__}: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    longest = getattr(config, "max_position_embeddings", None) or length
    length = min(length, longest, tokenizer.model_max_length)
    predicts = class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for start in range(0, len(texts), batch_size):
        batch: Batch = dict(
            tokenizer(
                list(texts[start : start + batch_size]),
                padding=tokenizer.pad_token is not None,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
        )
        if predicts or config.is_encoder_decoder:
            # -100 is the label that losses of transformers ignore.
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if config.is_encoder_decoder:
            # The labels are the inputs, and become the decoder's inputs shifted by one, so both have the same padding.
            batch["decoder_attention_mask"] = batch["attention_mask"]
        yield batch
