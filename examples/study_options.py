"""What the command lines of the examples have in common: adapters, where they write, and how they fail."""

from __future__ import annotations

import argparse
import os
import subprocess
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
        make_folder(option, folder)


def make_folder(option: str, folder: Path) -> None:
    """Make a folder that is written to, or stop."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"{option} {folder} cannot be used as a folder: {error.strerror}")
    if not os.access(folder, os.W_OK):
        stop(f"{option} {folder} cannot be written to")


def add_adapter_options(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Add the options of an adapter that is trained, saved, and loaded again by a second process."""
    add = parser.add_argument
    add("--r", type=int, default=4, help="rank of each subband's pair; a layer's is (3 levels + 1) r (default: 4)")
    add("--levels", type=int, default=1, help="levels of the wavelet decomposition (default: 1)")
    add("--wavelet", default="haar", help="an orthogonal PyWavelets wavelet, such as db2 or sym4 (default: haar)")
    add("--seed", type=int, default=0, help="seed of splits, initial values and order (default: 0)")
    add(
        "--output-dir",
        type=Path,
        default=Path(output_dir),
        help="folder for the adapter and the pictures (default: %(default)s)",
    )
    add(
        "--reload",
        action="store_true",
        help="only load the adapter that an earlier run left in --output-dir, and compare its logits with those of "
        "that run; the script starts itself with this option as its second process",
    )


def reload_in_second_process(output_dir: Path) -> None:
    """Start this script again with --reload, or stop if what it loads is not what was saved."""
    command = [sys.executable, sys.argv[0], "--reload", "--output-dir", str(output_dir)]
    if subprocess.run(command).returncode != 0:
        stop("the second process failed")


def check_learning_rate(value: float) -> None:
    if not value > 0:
        stop(f"--learning-rate {value} must be greater than 0")
