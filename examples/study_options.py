"""What the command lines of the studies have in common: where they write, and how they fail."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn


def stop(message: str) -> NoReturn:
    """End with a single line on stderr and exit status 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}")


def study_parser(description: str | None, output_dir: str) -> argparse.ArgumentParser:
    """A parser of `--output-dir`, `--results`, `--tune` and `--quick`, for `parse_study`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path(output_dir), help="folder (default: %(default)s)")
    add("--results", type=Path, help="folder of the JSON lines and the picture (default: --output-dir)")
    add("--tune", action="store_true", help="show what the learning rates were chosen by, on other seeds")
    add("--quick", action="store_true", help="two seeds of a few steps, in a folder of their own")
    return parser


def parse_study(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; `results` is a folder in any case."""
    args = parser.parse_args()
    if args.quick:
        args.output_dir /= "quick"
        args.results = None
    args.results = args.results or args.output_dir
    return args


def make_folders(args: argparse.Namespace) -> None:
    """Make the folders that are written to, or stop."""
    for option, folder in (("--output-dir", args.output_dir), ("--results", args.results)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            stop(f"{option} {folder} cannot be used as a folder: {error.strerror}")
