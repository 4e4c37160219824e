"""Puts together the commands of `wara-peft`, each of which has its own file, and the option `--version`.

A command imports the libraries that it needs when it runs. So a library that is missing or broken stops only the
commands that use it, and help texts and usage errors do not wait for PyTorch and PEFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import combine, compress, export, inspect, merge, run
from .interruption import PROGRAM
from .terminal import out

app = typer.Typer(
    name=PROGRAM,
    help="Export, merge, combine and inspect WaRA adapters without the base model in memory, or run what loads them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `failures_in_a_line` prints errors, and the whole traceback with --debug
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"{PROGRAM} {_version()}")
        raise typer.Exit


def _version() -> str:
    """Read `__version__` in the source of `wara_peft`.

    Importing `wara_peft` would take seconds. The metadata of an editable install hold the version that was installed,
    which may be older than the source that runs.
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
app.command(no_args_is_help=True, epilog=combine.EXAMPLES)(combine.combine)
app.command(epilog=compress.EXAMPLES)(compress.compress)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
# Options that stand after PROGRAM belong to the program, and not to `run`.
app.command(epilog=run.EXAMPLES, context_settings={"allow_interspersed_args": False})(run.run)
