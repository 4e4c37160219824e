"""Directories that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal


@contextmanager
def written_at_once(
    path: str | os.PathLike[str],
    existing: Literal["refuse", "replace", "update"] = "refuse",
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """Write a directory's files into a temporary one beside it, which takes its place once all are on disk.

    If the block raises, or is interrupted, nothing is left of it, and what stood at `path` is as it was.

    Args:
        path: the directory to write; parents that are missing are made.
        existing: what to do if it is there already: "refuse" raises, "replace" removes the old one when the new one
            is complete, "update" puts each new file in the place of an old one and leaves others alone.
        inputs: what is read meanwhile, and must not be replaced.

    Yields:
        The temporary directory, empty.

    Raises:
        ValueError: `path` is not a directory, or is there and must not be, or holds an input that would be replaced.
        OSError: the directory cannot be made, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"path={str(path)!r} is a file; name a directory.")
    if target.exists() and existing == "refuse":
        raise ValueError(f"{str(path)!r} exists already; name another directory, or overwrite it (--overwrite).")
    if existing == "replace":
        held = [str(item) for item in (*inputs, Path.cwd()) if Path(os.path.realpath(item)).is_relative_to(target)]
        if held:
            raise ValueError(f"{str(path)!r} holds {held[0]!r}, which must not be replaced; name another directory.")
    new_parents = [parent for parent in target.parents if not parent.exists()]  # innermost first
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        _move(temporary, target, existing)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _move(temporary: Path, target: Path, existing: str) -> None:
    if not target.exists():
        temporary.rename(target)
    elif existing == "update":
        for file in temporary.iterdir():
            file.replace(target / file.name)
        temporary.rmdir()
    else:
        old = temporary.with_suffix(".old")
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old)


def _flush(path: Path) -> None:
    """Have the file, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
