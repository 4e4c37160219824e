"""The command `wara-peft`. It imports `wara_peft`, which imports PyTorch and PEFT, only when a subcommand needs it."""

from __future__ import annotations

import sys

from .interruption import INTERRUPTED, PROGRAM, STATUS


def main() -> None:
    """Run the installed command. Ctrl-C gives one line of text, even while the command still imports its files."""
    try:
        from .app import app

        app(prog_name=PROGRAM)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: {INTERRUPTED}", file=sys.stderr)
        sys.exit(STATUS)
