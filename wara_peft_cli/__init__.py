"""The command line `wara-peft`: it imports `wara_peft`, and so PyTorch and PEFT, only when a command needs them."""

from __future__ import annotations

import sys

from .interruption import INTERRUPTED, PROGRAM, STATUS


def main() -> None:
    """Entry point of the installed command, which can be interrupted while it still imports its own files."""
    try:
        from .app import app

        app(prog_name=PROGRAM)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: {INTERRUPTED}", file=sys.stderr)
        sys.exit(STATUS)
