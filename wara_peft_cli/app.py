"""The commands of `wara-peft`, each of which is a file of its own, and its `--version`.

A command imports what it needs when it runs. So what one of them uses cannot stop the others, and help and usage
errors do not wait for PyTorch and PEFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import compress, export, inspect, merge, run
from .interruption import PROGRAM
from .terminal import out

app = typer.Typer(
    name=PROGRAM,
    help="Export, merge and inspect WaRA adapters without the base model in memory, or run a program that loads them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"{PROGRAM} {_version()}")
        raise typer.Exit


def _version() -> str:
    """Read `__version__` in the source of `wara_peft`.

    Importing that takes seconds, and the metadata of an editable install have the version that was installed, which
    may be older than the one that runs.
    """
    source = Path(__file__).parents[1] / "wara_peft" / "__init__.py"
    return source.read_text(encoding="utf-8").partition('\n__version__ = "')[2].partition('"')[0]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """Take the options that are given before a command."""


app.command(no_args_is_help=True, epilog=export.EXAMPLES)(export.export)
app.command(epilog=merge.EXAMPLES)(merge.merge)
app.command(epilog=compress.EXAMPLES)(compress.compress)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=run.EXAMPLES, context_settings={"allow_interspersed_args": False})(run.run)
