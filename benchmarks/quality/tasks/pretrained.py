"""Weights that are trained once and kept in an ignored folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CACHE = Path(__file__).parents[1] / "cache"


def cached(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, from `cache/<name>.pt` if it is there.

    Processes that make it at the same time make the same, and each puts it there whole.
    """
    path = CACHE / f"{name}.pt"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        made = make()
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(made, partial)
        partial.replace(path)
    return torch.load(path, weights_only=True)
