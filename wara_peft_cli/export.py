"""`wara-peft export`: writes a WaRA adapter as a LoRA, exactly or with a lower rank."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from .interruption import PROGRAM
from .options import (
    BY_EXPERT,
    FORMATS,
    Debug,
    Dtype,
    Engine,
    FileFormat,
    Overwrite,
    local_directory,
    torch_dtype,
)
from .terminal import failures_in_a_line, out, print_message, progress_bar

EXAMPLES = f"""Examples:\n
    {PROGRAM} export my-adapter my-lora\n
    {PROGRAM} export my-adapter my-lora --dtype bf16 --strict\n
    {PROGRAM} export my-adapter my-lora --for vllm --base my-base-model\n
    {PROGRAM} export my-adapter my-lora --rank 8\n
    {PROGRAM} export my-adapter my-lora --energy 0.99\n
    {PROGRAM} export unet-adapter text-adapter my-lora --format diffusers\n
    {PROGRAM} export my-adapter my-lora.gguf --format gguf --base my-base-model"""


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
    path: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Directory to write, or file for gguf. It is empty until it is complete."),
    ],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Best approximation of this rank; exact if left out.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Smallest rank that keeps this share of every module's energy, as 0.99."),
    ] = None,
    dtype: Dtype = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if engines cannot take all of the adapter.")] = False,
    engine: Annotated[
        Engine | None,
        typer.Option(
            "--for",
            help="What is to load it: fail if that cannot, and name experts as it does. vllm-3d is vLLM with models "
            "whose experts it reads stacked.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        FileFormat | None,
        typer.Option(
            help="Whose files to write; diffusers' hold several adapters, gguf is llama.cpp's.  "
            "[default: that of --for, or peft]",
            show_default=False,
        ),
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="unet, transformer, text_encoder...: which one ADAPTER is of, if its config does not say.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="BASE",
            help="The base model's directory, for gguf and for experts; for gguf also its GGUF file.",
            show_default=False,
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
    if engine is not None and format not in (None, FORMATS.get(engine, "peft")):
        raise typer.BadParameter(f"--for {engine} reads --format {FORMATS.get(engine, 'peft')}, not {format}.")
    format = format or FORMATS.get(engine or "peft", "peft")
    if format != "diffusers" and (component or len(adapters) > 1):
        raise typer.BadParameter("several adapters, and --component, are for --format diffusers.")
    if component and len(component) != len(adapters):
        raise typer.BadParameter(f"give --component once for each of the {len(adapters)} adapters, in their order.")
    if format == "gguf" and base is None:
        asked = "--format gguf" if engine is None else f"--for {engine}"
        raise typer.BadParameter(f"{asked} needs --base, the base model's directory or its GGUF file.")
    if base is not None and format != "gguf" and engine not in BY_EXPERT:
        raise typer.BadParameter("--base is for --format gguf, and for experts with --for vllm or sglang.")
    with failures_in_a_line(debug):
        sources = [local_directory(adapter) for adapter in adapters]
        from wara_peft.disk.checkpoints.directory import file_written_at_once
        from wara_peft.lora.engines import vllm_max_lora_rank
        from wara_peft.lora.export import convert, place_to_write, write_loras
        from wara_peft.lora.gguf_files import modelfile

        names: list[str | None] = [*component] if component else [None] * len(sources)
        kept = energy if rank is None else rank
        to_format = partial(
            convert, rank=kept, dtype=torch_dtype(dtype), strict=strict, format=format, base=base, engine=engine
        )
        existing: Literal["refuse", "replace"] = "replace" if overwrite else "refuse"
        beside = path.with_suffix(".Modelfile")
        # OUT is claimed before adapters are converted, so one that exists costs no minutes of work.
        with ExitStack() as claims:
            if base is not None and format == "gguf":
                text = claims.enter_context(file_written_at_once(beside, existing, [base]))
                text.write_text(modelfile(path, base), encoding="utf-8")
            inputs = sources if base is None else [*sources, base]
            place = claims.enter_context(place_to_write(path, format, existing, inputs))
            loras = [
                to_format(source, component=name, track=progress_bar("Exporting"))
                for source, name in zip(sources, names, strict=True)
            ]
            write_loras(place, loras)
        for lora in loras:
            of_component = f" of {lora.component}" if lora.component else ""
            modules = len(lora.config.target_modules or ())
            if engine in BY_EXPERT:  # the config has the names of experts' projections, not each expert's
                modules = sum(key.endswith(".lora_A.weight") for key in lora.state_dict)
            parameters = len(lora.config.target_parameters or ())
            and_parameters = f" and {parameters} parameters" if parameters else ""
            print_message(
                f"Wrote {path}: LoRA of rank {lora.config.r}, {modules} modules{and_parameters}{of_component}."
            )
            rounding = f", but for the rounding to {dtype}" if lora.rounded else ""
            if kept is None:
                out.print(f"It is exact{rounding}.")
            else:
                out.print(f"Relative error of the weight update, in Frobenius norm: {lora.error.total:.3g}{rounding}.")
        if format == "diffusers":
            print_message(f"Load it by pipeline.load_lora_weights({str(path)!r}).")
            return
        if base is not None and format == "gguf":
            model = base if base.is_file() else "BASE.gguf"
            print_message(f"llama.cpp: {shlex.join(['llama-server', '-m', str(model), '--lora', str(path)])}")
            print_message(f"Ollama: {shlex.join(['ollama', 'create', 'NAME', '-f', str(beside)])}")
            return
        if engine in ("peft", "sglang"):
            if engine == "sglang":
                out.print(f"SGLang needs: --max-lora-rank {loras[0].config.r}")
            return
        allowed = vllm_max_lora_rank(loras[0].config.r)
        if allowed is None:
            out.print("vLLM serves no LoRA of this rank: export with --rank 512 or less, or merge the adapter.")
        else:
            out.print(f"vLLM needs: --max-lora-rank {allowed}")
