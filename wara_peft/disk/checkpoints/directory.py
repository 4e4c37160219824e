"""Directories that are there whole or not at all, also when several processes write to one place."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal


@contextmanager
def written_at_once(
    path: str | os.PathLike[str],
    existing: Literal["refuse", "replace", "update"] = "refuse",
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """Write a directory's files into a temporary one beside it, which takes its place once all are on disk.

    If the block raises, or is interrupted, nothing is left of it, and what stood at `path` is as it was. The name is
    claimed first: a directory is made at `path` and locked, so that of several processes that write to one place one
    does. A process that is killed may leave the empty claim and the temporary directory; the next one takes the first
    over, and removes the second.

    Args:
        path: the directory to write; parents that are missing are made.
        existing: what to do if it is there already, and not empty: "refuse" raises, "replace" removes the old one when
            the new one is complete, "update" takes out the files that are to be replaced, puts the new ones there, and
            leaves others alone. Killed in between, "update" may leave names without a file, never old beside new.
        inputs: what is read meanwhile, and must not be replaced.

    Yields:
        The temporary directory, empty.

    Raises:
        ValueError: `path` is not a directory, or is there and must not be, or is being written by another process, or
            holds an input that would be replaced.
        OSError: the directory cannot be made, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"path={str(path)!r} is a file; name a directory.")
    file = next((parent for parent in target.parents if parent.exists()), target.parent)
    if not file.is_dir():
        raise ValueError(f"path={str(path)!r} would lie in {str(file)!r}, which is a file; name a directory.")
    _check_inputs(path, target, existing, inputs)
    new_parents = [parent for parent in target.parents if not parent.exists()]  # innermost first
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    claimed = False
    try:
        for parent in reversed(new_parents):
            parent.mkdir(exist_ok=True)
        _clear_leftovers(target)
        with suppress(FileExistsError):
            target.mkdir()
            claimed = True
        with _locked(target) as is_ours:
            if not is_ours:
                claimed = False
                raise ValueError(f"{str(path)!r} is being written by another process; name another directory.")
            if existing == "refuse" and any(target.iterdir()):
                raise ValueError(
                    f"{str(path)!r} exists already; name another directory, or overwrite it (overwrite=True, on the "
                    "command line --overwrite)."
                )
            temporary.mkdir()
            with _locked(temporary):
                yield temporary
                for file in temporary.iterdir():
                    _flush(file)
                _flush(temporary)
                _move(temporary, target, existing)
                _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for empty in [target, *new_parents] if claimed else new_parents:
            with suppress(OSError):  # it is not empty: someone else has put something there
                empty.rmdir()
        raise


def _check_inputs(path: object, target: Path, existing: str, inputs: Sequence[str | os.PathLike[str]]) -> None:
    real = {str(item): Path(os.path.realpath(item)) for item in inputs}
    if existing == "update":
        held = [item for item, place in real.items() if place == target]
    else:
        real[str(Path.cwd())] = Path.cwd()
        held = [item for item, place in real.items() if target.is_dir() and place.is_relative_to(target)]
    if held and (existing != "refuse" or not any(target.iterdir())):
        raise ValueError(f"{str(path)!r} holds {held[0]!r}, which must not be replaced; name another directory.")


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether this process alone holds the directory, which it does until the block ends."""
    import fcntl  # which there is on POSIX alone, where directories can be locked

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            pass
        # Another process may have put a complete directory in the place of the one that was opened.
        yield free and directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat())
    finally:
        os.close(descriptor)


def _clear_leftovers(target: Path) -> None:
    """Remove what killed processes have left beside the target, and put back what one of them was about to replace."""
    for leftover in target.parent.iterdir():
        kind = re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(partial|old)", leftover.name)
        if kind is None or not leftover.is_dir() or leftover.is_symlink():
            continue
        with suppress(OSError), _locked(leftover) as is_ours:  # one that cannot be removed harms nobody
            if is_ours and kind[1] == "old" and not target.exists():
                leftover.rename(target)
            elif is_ours:
                shutil.rmtree(leftover, ignore_errors=True)


def _move(temporary: Path, target: Path, existing: str) -> None:
    if existing == "update":
        _move_files(temporary, target)
    elif existing == "replace" and any(target.iterdir()):
        old = temporary.with_suffix(".old")
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        try:
            temporary.rename(target)  # onto the empty directory
        except OSError as error:
            raise ValueError(f"{str(target)!r} was written by someone else meanwhile: {error.strerror}.") from error


def _move_files(temporary: Path, target: Path) -> None:
    """Put all files of a directory into another, or leave that as it is."""
    files = list(temporary.iterdir())
    folders = [file.name for file in files if (target / file.name).is_dir()]
    if folders:
        raise ValueError(f"{str(target / folders[0])!r} is a directory, where a file is to be written.")
    old = temporary / "old"
    old.mkdir()
    try:
        for file in files:
            with suppress(FileNotFoundError):
                (target / file.name).rename(old / file.name)
        for file in files:
            file.rename(target / file.name)
    except BaseException:
        for file in files:
            if not file.exists():
                (target / file.name).rename(file)
            with suppress(FileNotFoundError):
                (old / file.name).rename(target / file.name)
        raise
    shutil.rmtree(temporary)


def _flush(path: Path) -> None:
    """Have the file, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
