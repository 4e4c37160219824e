"""Measuring a model of texts: the perplexity of a language model, or the accuracy of a classifier."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ...calibration.batches import in_eval_mode
from .text_batches import IGNORED


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], is_shifted: bool) -> float:
    """Compute exp(−Σ log p / N) over all N predicted tokens of all batches.

    Args:
        model: a language model.
        batches: batches with `labels`, where `IGNORED` does not count.
        is_shifted: whether the logits at a position predict the label at that position, as in a model with an encoder
            and a decoder; otherwise they predict the next label.
    """
    total, count = 0.0, 0
    for logits, labels in _results(model, batches):
        if not is_shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        for row, targets in zip(logits, labels, strict=True):  # float32 logits of a whole batch may not fit in memory
            wide = row.to(torch.promote_types(row.dtype, torch.float32))
            total += float(F.cross_entropy(wide, targets, reduction="sum"))
        count += int((labels != IGNORED).sum())
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Compute the share of texts whose label has the largest logit.

    Args:
        model: a classifier of texts.
        batches: batches with `labels`, one for each text.
    """
    right, count = 0, 0
    for logits, labels in _results(model, batches):
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return right / count


def _results(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Any:
    device = next(model.parameters()).device
    with in_eval_mode(model):
        for batch in batches:
            batch = send_to_device(batch, device)
            yield model(**batch).logits, batch["labels"]
