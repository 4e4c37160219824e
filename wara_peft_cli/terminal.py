"""Prints messages, errors and progress. Control characters in names and messages are printed as escapes."""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import track

from .interruption import INTERRUPTED, PROGRAM, STATUS

if TYPE_CHECKING:
    from wara_peft.disk.adapters.adapter import Track

# Markup is off in both, as names of modules and files may hold brackets. If the output goes to a file or a pipe, lines
# are wide, so that names of modules are not broken and can be searched for.
out = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def failures_in_a_line(debug: bool) -> Iterator[None]:
    """Report an exception of the block in one line, and exit with status 1.

    SIGINT and SIGTERM raise KeyboardInterrupt in the block, so that it can clean up. After SIGINT (Ctrl-C) the exit
    status is 130, which shells expect. Usage errors are left to typer, which prints them with the usage.

    Args:
        debug: whether to print the whole traceback in place of one line.
    """
    interrupted_by: int | None = None

    def interrupt(number: int, _: Any) -> None:
        nonlocal interrupted_by
        interrupted_by = number  # kept here, as a library may turn KeyboardInterrupt into another exception
        raise KeyboardInterrupt

    # A parent may have a signal ignored, as nohup and background jobs do; it stays ignored.
    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Python's default shows a warning once for each line of code, and so not for a second adapter.
            warnings.simplefilter("always", UserWarning)
            yield
    except typer.BadParameter:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            for line in traceback.format_exc().splitlines():
                err.print(escape_controls(line))
        else:
            reason = _reason(error) if interrupted_by is None else INTERRUPTED
            _complain(reason or type(error).__name__)
        # `from None`, as the error has been printed.
        raise typer.Exit(STATUS if interrupted_by == signal.SIGINT else 1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(error: BaseException) -> str:
    """The error's text; a system error is given without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    return str(error)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(f"warning: {message}")


def _complain(text: str) -> None:
    """Print a text of any number of lines as one line to stderr, after the program's name."""
    err.print(f"{PROGRAM}: {escape_controls(' '.join(text.split()))}")


def print_message(text: str, console: Console = out) -> None:
    """Print a text that may hold names from files, without breaking lines."""
    console.print(escape_controls(text), soft_wrap=True)


def escape_controls(text: str) -> str:
    """Replace characters that a terminal would obey as commands, or that cannot be encoded, by escapes.

    Names come from files that are not trusted, and could otherwise change what the terminal shows.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def progress_bar(description: str) -> Track:
    """A `Track` that shows a progress bar, if stderr is a terminal."""
    return partial(track, description=description, console=err, transient=True, disable=not err.is_terminal)
