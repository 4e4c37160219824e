"""Prints reports as tables: the modules and energies of an adapter, and the layers of a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Column, Table

from .terminal import escape_controls, out, print_message

if TYPE_CHECKING:
    from wara_peft.compression import CompressionReport
    from wara_peft.inspection.saved_adapter import AdapterReport


def print_compression(report: CompressionReport, now: Mapping[str, Mapping[str, object]] | None = None) -> None:
    """Print what compressing did to each layer.

    Args:
        report: the report that was made when the model was compressed.
        now: the present sizes of each layer. Merging an adapter changes ranks; a rank that has changed is shown too.
    """
    table = Table(Column("layer", overflow="fold"), "out x in", "rank", "parameters", "before", "lost")
    for layer in report.layers:
        values = "" if layer.nonzeros is None else f", {layer.nonzeros} values a row"
        if now is not None and layer.rank is not None:
            sizes = now.get(layer.name, {})
            rank = sizes.get("rank", sizes.get("atoms", "dense"))
            values += "" if rank == layer.rank else f", now {rank}"
        table.add_row(
            escape_controls(layer.name),
            f"{layer.shape[0]} x {layer.shape[1]}",
            f"dense: {escape_controls(layer.reason)}" if layer.rank is None else f"{layer.rank}{values}",
            f"{layer.parameters_after:,}",
            f"{layer.parameters_before:,}",
            f"{layer.lost:.2%}",
        )
    out.print(table)
    for name, reason in report.left.items():
        print_message(f"{name} is left as it is: {reason}.")
    print_message(report.summary)
    if report.evaluation is not None:
        print_message(str(report.evaluation))


def print_adapter(report: AdapterReport) -> None:
    """Print an adapter's modules, and how its energy is shared among subbands and levels."""
    print_message(
        f"form={report.form}, wavelet={report.wavelet}, levels={report.levels}, base model: {report.base_model}"
    )
    table = Table(Column("module", overflow="fold"), "kind", "out x in", "ranks", "R", "trained", "as LoRA")
    for module in report.modules:
        ranks = set(module.ranks.values())
        table.add_row(
            escape_controls(module.name),
            module.kind,
            f"{module.out_features} x {module.in_features}",
            f"{ranks.pop()} in each of {len(module.ranks)}" if len(ranks) == 1 else pairs(module.ranks),
            str(module.rank),
            f"{module.parameters:,}",
            "none" if module.lora_parameters is None else f"{module.lora_parameters:,}",
        )
    out.print(table)
    parameters = sum(module.parameters for module in report.modules)
    lora = report.lora_parameters
    as_lora = "it mixes tokens, and is no LoRA" if lora is None else f"as LoRA of rank {report.rank}: {lora:,}"
    out.print(f"{len(report.modules)} modules, {parameters:,} trained parameters; {as_lora}.")
    for title, shares in (("subband", report.energy_shares()), ("level", report.level_shares())):
        table = Table(title, "share of energy")
        for name, share in shares.items():
            table.add_row(name, f"{share:.1%}")
        out.print(table)
    if report.others:
        print_message(f"It also holds, in full: {', '.join(report.others)}")


def pairs(values: Mapping[str, object]) -> str:
    """Write a mapping in one line, as in "aa1:4 dd1:2"."""
    return " ".join(f"{name}:{value}" for name, value in values.items())
