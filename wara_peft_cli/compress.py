"""`wara-peft compress`: makes a model smaller by factorising its linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .interruption import PROGRAM
from .options import Allocation, Cost, Debug, Out, Overwrite, Solver, check_device, local_directory, read_budget
from .tables import print_compression
from .terminal import err, failures_in_a_line, print_message

EXAMPLES = f"""Examples:\n
    {PROGRAM} compress my-base-model my-small-model --budget 0.6 --texts texts.txt\n
    {PROGRAM} compress my-base-model my-small-model --budget 48MB --solver svd\n
    {PROGRAM} compress my-classifier out --budget 0.5 --solver fisher --texts train.csv --evaluate test.csv\n
    {PROGRAM} compress my-base-model my-small-model --budget 0.5 --texts texts.txt --statistics my-statistics"""


def compress(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Directory of the base model, or a Hub name.")],
    path: Out,
    budget: Annotated[
        Any,
        typer.Option(
            "--budget",
            parser=read_budget,
            metavar="SHARE|NUMBER|SIZE",
            help="What the layers may have: a share such as 0.6, a number of parameters, or bytes such as 48MB.",
        ),
    ],
    solver: Annotated[Solver, typer.Option(help="What error each layer's factors minimise.")] = "activation",
    allocation: Annotated[Allocation, typer.Option(help="How the budget is shared among layers.")] = "greedy",
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts to calibrate with: one in each line, or .jsonl or .csv with text and, for classifiers, label.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take statistics from there, or leave them there.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Layers to compress, by ends of names; may be repeated.")
    ] = None,
    cost: Annotated[Cost, typer.Option(help="What --allocation cost counts.")] = "flops",
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Take statistics anew as layers are compressed.")
    ] = False,
    evaluate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts to measure perplexity or accuracy with, before and after."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are run together.")] = 8,
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of a text, or of a block into which a decoder's texts are packed.")
    ] = 512,
    batches: Annotated[int | None, typer.Option(min=1, help="Batches to use at most.")] = None,
    memory: Annotated[int, typer.Option(min=1, metavar="BYTES", help="What statistics may take at a time.")] = 2**31,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Compress a model that comes with a tokenizer: factorise its linear layers under a budget."""
    with failures_in_a_line(debug):
        check_device(device)
        source = local_directory(base, weights=True)
        from wara_peft.compression.disk.from_texts import compress_checkpoint

        report = compress_checkpoint(
            source,
            path,
            budget,
            solver=solver,
            allocation=allocation,
            texts=texts,
            statistics=statistics,
            target_modules=target,
            cost=cost,
            sequential=sequential,
            evaluate=evaluate,
            batch_size=batch_size,
            length=length,
            batches=batches,
            max_bytes=memory,
            device=device,
            overwrite=overwrite,
            show_progress_bar=err.is_terminal,
        )
        print_compression(report)
        print_message(f"Wrote {path}; load it with wara_peft.compression.load_compressed.")
