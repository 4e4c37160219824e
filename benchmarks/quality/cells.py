"""A cell is one training run, and one line of JSON; a store keeps the lines, and hands a cell to one process only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """What decides a run.

    Attributes:
        task: name of a task, `family/variant`.
        method: name of a method.
        budget: trained parameters, in those of LoRA with rank 1; 0 for methods that have no size to choose.
        rate: peak learning rate.
        seed: base model, data, head, first values and order of batches. Equal seeds share all of it between methods.
    """

    task: str
    method: str
    budget: float
    rate: float
    seed: int

    @property
    def family(self) -> str:
        return self.task.partition("/")[0]


FIELDS = tuple(Cell.__dataclass_fields__)


class Store:
    """Finished cells in a folder, `<family>.jsonl`, one line a cell, only ever appended to.

    Lines are written whole under a lock of the file, so that processes may share the folder. What an interrupted
    write left behind is no line, and is closed by the next one.

    Args:
        folder: of the JSON lines.
        locks: folder of the files that a process holds while it works on their cells; the system lets go of them
            when the process ends, however it ends.
    """

    def __init__(self, folder: Path, locks: Path) -> None:
        self.folder = folder
        self.locks = locks
        folder.mkdir(parents=True, exist_ok=True)
        locks.mkdir(parents=True, exist_ok=True)
        self._read: dict[Path, int] = {}
        self._found: dict[Cell, dict[str, Any]] = {}

    def results(self) -> dict[Cell, dict[str, Any]]:
        """All finished cells, also those that other processes finished meanwhile."""
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            complete = text.rfind(b"\n") + 1
            self._read[path] = self._read.get(path, 0) + complete
            for line in text[:complete].splitlines():
                try:
                    found = json.loads(line)
                except ValueError:  # the beginning of a line whose writer was killed
                    continue
                self._found.setdefault(Cell(**{name: found[name] for name in FIELDS}), found)
        return self._found

    def append(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keep the result of a cell."""
        line = json.dumps({**asdict(cell), **result}).encode() + b"\n"
        with (self.folder / f"{cell.family}.jsonl").open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Hold a cell while it runs; False where it is finished, or another process holds it."""
        name = hashlib.sha256(repr(astuple(cell)).encode()).hexdigest()[:24]
        with (self.locks / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield cell not in self.results()
