"""What the command line prints, and how it fails: text from elsewhere as it is, with control characters as escapes."""

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

# In a file or a pipe names of modules stay in one line, for who searches there.
out = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def failures_in_a_line(debug: bool) -> Iterator[None]:
    """Turn an exception into one line and exit status 1, and signals to interrupt or terminate into an exception.

    A usage error goes on to typer, which reports it. After Ctrl-C the exit status is the one by which shells know it.
    """
    interrupted_by: int | None = None

    def interrupt(number: int, _: Any) -> None:
        nonlocal interrupted_by
        interrupted_by = number  # what a library makes of the exception may be another one
        raise KeyboardInterrupt

    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
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
        raise typer.Exit(STATUS if interrupted_by == signal.SIGINT else 1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(error: BaseException) -> str:
    """The error's text, without a number where it is the system's."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    return str(error)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(f"warning: {message}")


def _complain(text: str) -> None:
    err.print(f"{PROGRAM}: {escape_controls(' '.join(text.split()))}")


def print_message(text: str, console: Console = out) -> None:
    console.print(escape_controls(text), soft_wrap=True)


def escape_controls(text: str) -> str:
    """The text with escapes in place of characters that a terminal would obey, or that no encoding has."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def progress_bar(description: str) -> Track:
    """A progress bar, on a terminal."""
    return partial(track, description=description, console=err, transient=True, disable=not err.is_terminal)
