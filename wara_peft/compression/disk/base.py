"""The saved model that is to be compressed, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ...disk.checkpoints.checkpoint import Checkpoint
from ...disk.checkpoints.skeleton import Skeleton
from ...disk.checkpoints.tensors import FLOATS
from ...factorized.saved import kinds_and_sizes
from .model import model_class_of


def dense_base(directory: Path) -> tuple[Skeleton, PreTrainedModel]:
    """Make a saved model on the meta device, in the dtype in which transformers will load it.

    Raises:
        FileNotFoundError: a file is missing, or the weights are only there as pickles.
        ValueError: the config names no class of transformers, or the model is compressed already.
    """
    skeleton = Skeleton(Checkpoint(directory))
    empty = skeleton.make(model_class_of(skeleton))
    done = kinds_and_sizes(empty)
    if done:
        raise ValueError(
            f"{str(directory)!r} has {len(done)} factorised layers already. Compress the model it was made of."
        )
    dtypes = (info.dtype for info in skeleton.checkpoint.tensors.values() if info.dtype in FLOATS)
    dtype = cast(torch.dtype | None, skeleton.config.dtype) or FLOATS[next(dtypes, "F32")]
    return skeleton, cast(PreTrainedModel, cast(nn.Module, empty).to(dtype))
