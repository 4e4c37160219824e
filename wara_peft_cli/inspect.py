"""`wara-peft inspect`: shows ranks, sizes and energies of a saved adapter, or of a compressed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .interruption import PROGRAM
from .options import Adapter, Debug, local_directory
from .tables import pairs, print_adapter, print_compression
from .terminal import err, failures_in_a_line, out, print_message, progress_bar

EXAMPLES = f"""Examples:\n
    {PROGRAM} inspect my-adapter\n
    {PROGRAM} inspect my-adapter --plot energy.png\n
    {PROGRAM} inspect my-small-model\n
    {PROGRAM} inspect my-adapter --json"""


def inspect(
    adapter: Adapter,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw modules x subbands.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Show an adapter's ranks, and its energy by subband and level, or the ranks and losses of a compressed model."""
    with failures_in_a_line(debug):
        # A directory with a model's config and without an adapter's is taken for a compressed model.
        if (adapter / "config.json").is_file() and not (adapter / "adapter_config.json").is_file():
            _inspect_compressed(adapter, plot, as_json)
            return
        source = local_directory(adapter)
        from wara_peft.disk.adapters.adapter import SavedAdapter
        from wara_peft.inspection.saved_adapter import inspect_adapter

        report = inspect_adapter(SavedAdapter(source), progress_bar("Reading"))
        if plot is not None:
            report.plot(plot)
        if as_json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            print_adapter(report)
        if plot is not None:
            print_message(f"Wrote {plot}: ranks and shares of energy, modules x subbands.", err if as_json else out)


def _inspect_compressed(path: Path, plot: Path | None, as_json: bool) -> None:
    """Show what compressing did, or only the layers' present sizes if the directory has no report."""
    from wara_peft.compression.disk.model import saved_layers, saved_report

    if plot is not None:
        raise ValueError(f"{str(path)!r} is a compressed model, which has no subbands to plot.")
    report, layers = saved_report(path), saved_layers(path)
    if as_json:
        print(json.dumps({"layers": layers, "report": report and report.as_dict()}, indent=2))
    elif report is not None:
        print_compression(report, layers)
    else:
        for name, sizes in layers.items():
            print_message(f"{name}: {pairs(sizes)}")
