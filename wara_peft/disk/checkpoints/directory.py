"""Writes directories and files that are complete or not there at all, even if several processes write to one place."""

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
    """Let a block write files into a temporary directory, which is moved to `path` once all files are on disk.

    If the block raises, or is interrupted, its files are removed, and `path` holds what it held before. Before the
    block starts, this function claims the name: it makes a directory at `path` and locks it, so that only one of
    several processes writes to one place. A process that is killed may leave the empty directory at `path` and the
    temporary one. The next process uses the first, and removes the second.

    Args:
        path: the directory to write; parents that are missing are made.
        existing: what to do if the directory is there already, and not empty. "refuse" raises. "replace" removes the
            old directory when the new one is complete. "update" removes the files that are to be replaced, then puts
            the new ones there, and keeps all others. A process that is killed in between may leave files missing, but
            never an old file beside a new one.
        inputs: files or directories that the block reads, and that must not be replaced.

    Yields:
        The temporary directory, empty.

    Raises:
        ValueError: `path` is a file, or is not empty and `existing` is "refuse", or is being written by another
            process, or holds an input that would be replaced.
        OSError: the directory cannot be made, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"path={str(path)!r} is a file; name a directory.")
    _check_parents(path, target)
    _check_inputs(path, target, existing, inputs)
    new_parents = [parent for parent in target.parents if not parent.exists()]  # innermost first
    # The temporary directory lies beside the target, because a rename is one step only within a file system.
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
                claimed = False  # the other process needs the directory, so the end of this function keeps it
                raise ValueError(f"{str(path)!r} is being written by another process; name another directory.")
            if existing == "refuse" and any(target.iterdir()):
                raise ValueError(
                    f"{str(path)!r} exists already; name another directory, or overwrite it (overwrite=True, on the "
                    "command line --overwrite)."
                )
            temporary.mkdir()
            with _locked(temporary):
                yield temporary
                # Without this, a power failure soon after the move could leave the new names with empty files.
                for file in temporary.iterdir():
                    _flush(file)
                _flush(temporary)
                _move(temporary, target, existing)
                _flush(target.parent)
    except BaseException:  # KeyboardInterrupt is no Exception, and must leave nothing behind either
        shutil.rmtree(temporary, ignore_errors=True)
        for empty in [target, *new_parents] if claimed else new_parents:
            with suppress(OSError):  # the directory is not empty, because another process has put something there
                empty.rmdir()
        raise


@contextmanager
def file_written_at_once(
    path: str | os.PathLike[str],
    existing: Literal["refuse", "replace"] = "refuse",
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """Let a block write a temporary file, which is moved to `path` once it is on disk.

    It does for a file what `written_at_once` does for a directory. The name is claimed by an empty file.

    Args:
        path: the file to write; parents that are missing are made.
        existing: what to do if the file is there already, and not empty. "refuse" raises. "replace" replaces it when
            the new one is complete.
        inputs: files or directories that the block reads, and that must not be replaced.

    Yields:
        The temporary file, empty.

    Raises:
        ValueError: `path` is a directory, or a file that is not empty and `existing` is "refuse", or is being written
            by another process, or is an input.
        OSError: the file cannot be made, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"path={str(path)!r} is a directory; name a file.")
    _check_parents(path, target)
    if any(Path(os.path.realpath(item)) == target for item in inputs):
        raise ValueError(f"{str(path)!r} is read, and must not be replaced; name another file.")
    new_parents = [parent for parent in target.parents if not parent.exists()]  # innermost first
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    claimed = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftover_files(target)
        with suppress(FileExistsError):
            target.touch(exist_ok=False)
            claimed = True
        with _locked(target) as is_ours:
            if not is_ours:
                claimed = False  # the other process needs the file, so the end of this function keeps it
                raise ValueError(f"{str(path)!r} is being written by another process; name another file.")
            if existing == "refuse" and target.stat().st_size:
                raise ValueError(
                    f"{str(path)!r} exists already; name another file, or overwrite it (on the command line "
                    "--overwrite)."
                )
            temporary.touch()
            with _locked(temporary):
                yield temporary
                _flush(temporary)
                temporary.replace(target)
                _flush(target.parent)
    except BaseException:  # KeyboardInterrupt is no Exception, and must leave nothing behind either
        with suppress(OSError):
            temporary.unlink()
        with suppress(OSError):  # another process has removed the file
            if claimed and not target.stat().st_size:
                target.unlink()
        for empty in new_parents:
            with suppress(OSError):  # the directory is not empty, because another process has put something there
                empty.rmdir()
        raise


def _check_parents(path: object, target: Path) -> None:
    file = next((parent for parent in target.parents if parent.exists()), target.parent)
    if not file.is_dir():
        raise ValueError(f"path={str(path)!r} would lie in {str(file)!r}, which is a file; name another place.")


def _check_inputs(path: object, target: Path, existing: str, inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse a target that holds an input.

    "update" keeps the target's other files and folders, so an input may lie inside. "replace" removes all of them, so
    it must not, and neither may the working directory.
    """
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
    """Lock a directory or a file until the block ends; the block gets False if another process holds the lock.

    The system removes such a lock when its process ends, so a killed process leaves none, unlike a file as a lock.
    """
    import fcntl  # only POSIX has it, so importing this file must not need it

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # the file system has no locks: go on without one
            pass
        # Between `open` and `flock` another process may have moved its complete directory to this path. Then the lock
        # is on a directory that is gone, and the directory at the path belongs to the other process.
        yield free and directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat())
    finally:
        os.close(descriptor)


def _clear_leftovers(target: Path) -> None:
    """Remove directories that killed processes have left beside the target.

    A process that is killed between the two renames in `_move` leaves the old directory under a temporary name and
    nothing at the target. Then the old directory is put back.
    """
    for leftover in target.parent.iterdir():
        kind = re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(partial|old)", leftover.name)
        if kind is None or not leftover.is_dir() or leftover.is_symlink():
            continue
        # A process that is still writing holds the lock of its temporary directory, so that directory stays. A
        # leftover that cannot be removed does no harm.
        with suppress(OSError), _locked(leftover) as is_ours:
            if is_ours and kind[1] == "old" and not target.exists():
                leftover.rename(target)
            elif is_ours:
                shutil.rmtree(leftover, ignore_errors=True)


def _clear_leftover_files(target: Path) -> None:
    """Remove temporary files that killed processes have left beside the target."""
    for leftover in target.parent.iterdir():
        is_name = re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.partial", leftover.name)
        if is_name and leftover.is_file() and not leftover.is_symlink():
            with suppress(OSError), _locked(leftover) as is_ours:
                if is_ours:
                    leftover.unlink()


def _move(temporary: Path, target: Path, existing: str) -> None:
    """Move the complete temporary directory, or for "update" its files, to the target."""
    if existing == "update":
        _move_files(temporary, target)
    elif existing == "replace" and any(target.iterdir()):
        # A rename replaces only an empty directory, so the old one is renamed first. If this process is killed between
        # the two renames, the next one puts the old directory back (`_clear_leftovers`).
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
            temporary.rename(target)  # POSIX lets a rename replace an empty directory, here the claimed one
        except OSError as error:
            raise ValueError(f"{str(target)!r} was written by someone else meanwhile: {error.strerror}.") from error


def _move_files(temporary: Path, target: Path) -> None:
    """Move all files of one directory into another; if that fails, put back the files that were replaced."""
    files = list(temporary.iterdir())
    folders = [file.name for file in files if (target / file.name).is_dir()]
    if folders:
        raise ValueError(f"{str(target / folders[0])!r} is a directory, where a file is to be written.")
    old = temporary / "old"
    old.mkdir()
    try:
        # All old files leave before the first new one arrives, so the directory never holds both.
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
    """Wait until a file's contents, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
