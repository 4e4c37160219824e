"""`wara-peft export`: writes a WaRA adapter as a LoRA, exactly or with a lower rank."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .interruption import PROGRAM
from .options import Debug, Dtype, FileFormat, Out, Overwrite, local_directory, torch_dtype
from .terminal import failures_in_a_line, out, print_message, progress_bar

EXAMPLES = f"""Examples:\n
    {PROGRAM} export my-adapter my-lora\n
    {PROGRAM} export my-adapter my-lora --dtype bf16 --strict\n
    {PROGRAM} export my-adapter my-lora --rank 8\n
    {PROGRAM} export my-adapter my-lora --energy 0.99\n
    {PROGRAM} export unet-adapter text-adapter my-lora --format diffusers"""


def export(
    context: typer.Context,
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ADAPTER",
            help="Directory of a saved WaRA adapter, or a Hub name; one a component for diffusers.",
            show_default=False,
        ),
    ] = None,
    *,
    path: Out,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Best approximation of this rank; exact if left out.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Smallest rank that keeps this share of every module's energy, as 0.99."),
    ] = None,
    dtype: Dtype = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if engines cannot take all of the adapter.")] = False,
    format: Annotated[
        FileFormat, typer.Option(help="Whose files to write; diffusers' hold several adapters.")
    ] = "peft",
    component: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="unet, transformer, text_encoder...: which one ADAPTER is of, if its config does not say.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write an adapter as a LoRA checkpoint, exactly or with a lower rank."""
    # The adapters have a default, so typer gives a single word to OUT. The user meant the adapter, and OUT is missing.
    if not adapters:
        context.fail("Missing argument 'OUT'.")
    if rank is not None and energy is not None:
        raise typer.BadParameter("give --rank or --energy, not both.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise typer.BadParameter(f"--energy {energy} is a share: more than 0, at most 1.")
    if format == "peft" and (component or len(adapters) > 1):
        raise typer.BadParameter("several adapters, and --component, are for --format diffusers.")
    if component and len(component) != len(adapters):
        raise typer.BadParameter(f"give --component once for each of the {len(adapters)} adapters, in their order.")
    with failures_in_a_line(debug):
        sources = [local_directory(adapter) for adapter in adapters]
        from wara_peft.disk.checkpoints.directory import written_at_once
        from wara_peft.lora.export import convert, vllm_max_lora_rank, write_loras

        names: list[str | None] = [*component] if component else [None] * len(sources)
        kept = energy if rank is None else rank
        to_format = partial(convert, rank=kept, dtype=torch_dtype(dtype), strict=strict, format=format)
        # The directory is claimed before adapters are converted, so an OUT that exists costs no minutes of work.
        with written_at_once(path, "replace" if overwrite else "refuse", inputs=sources) as directory:
            loras = [
                to_format(source, component=name, track=progress_bar("Exporting"))
                for source, name in zip(sources, names, strict=True)
            ]
            write_loras(directory, loras)
        for lora in loras:
            of_component = f" of {lora.component}" if lora.component else ""
            modules = len(lora.config.target_modules or ())
            parameters = len(lora.config.target_parameters or ())
            beside = f" and {parameters} parameters" if parameters else ""
            print_message(f"Wrote {path}: LoRA of rank {lora.config.r}, {modules} modules{beside}{of_component}.")
            rounding = f", but for the rounding to {dtype}" if lora.rounded else ""
            if kept is None:
                out.print(f"It is exact{rounding}.")
            else:
                out.print(f"Relative error of the weight update, in Frobenius norm: {lora.error.total:.3g}{rounding}.")
        if format == "diffusers":
            print_message(f"Load it by pipeline.load_lora_weights({str(path)!r}).")
            return
        allowed = vllm_max_lora_rank(loras[0].config.r)
        if allowed is None:
            out.print("vLLM serves no LoRA of this rank: export with --rank 512 or less, or merge the adapter.")
        else:
            out.print(f"vLLM needs: --max-lora-rank {allowed}")
