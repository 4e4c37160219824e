"""The `wara-peft` command: export an adapter to LoRA, merge it, look into it, compress a model, run programs with it.

Each subcommand imports what it needs when it runs, so that what one of them uses cannot stop the others.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wara_peft import __version__

from .options import Adapter, Debug, Dtype, Out, Overwrite, check_device, local_directory, read_budget
from .tables import pairs, print_adapter, print_compression
from .terminal import PROGRAM, err, failures_in_a_line, out, say, tracked

app = typer.Typer(
    name=PROGRAM,
    help="Export, merge and inspect WaRA adapters without the base model in memory, or run a program that loads them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """Take the options that are given before a command."""


@app.command(
    no_args_is_help=True,
    epilog=f"""Examples:\n
    {PROGRAM} export my-adapter my-lora\n
    {PROGRAM} export my-adapter my-lora --dtype bf16 --strict\n
    {PROGRAM} export my-adapter my-lora --rank 8\n
    {PROGRAM} export my-adapter my-lora --energy 0.99\n
    {PROGRAM} export unet-adapter text-adapter my-lora --format diffusers""",
)
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
        Literal["peft", "diffusers"], typer.Option(help="Whose files to write; diffusers' hold several adapters.")
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
    if not adapters:  # a single word is taken for OUT
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
        from wara_peft.disk.checkpoints.directory import written_at_once
        from wara_peft.lora.export import convert, vllm_max_lora_rank, write_loras

        sources = [local_directory(adapter) for adapter in adapters]
        names: list[str | None] = [*component] if component else [None] * len(sources)
        kept = energy if rank is None else rank
        to_format = partial(convert, rank=kept, dtype=dtype, strict=strict, format=format)
        with written_at_once(path, "replace" if overwrite else "refuse", inputs=sources) as directory:
            loras = [
                to_format(source, component=name, track=tracked("Exporting"))
                for source, name in zip(sources, names, strict=True)
            ]
            write_loras(directory, loras)
        for lora in loras:
            of_component = f" of {lora.component}" if lora.component else ""
            modules = len(lora.config.target_modules or ())
            parameters = len(lora.config.target_parameters or ())
            beside = f" and {parameters} parameters" if parameters else ""
            say(f"Wrote {path}: LoRA of rank {lora.config.r}, {modules} modules{beside}{of_component}.")
            rounding = f", but for the rounding to {str(dtype).removeprefix('torch.')}" if lora.rounded else ""
            if kept is None:
                out.print(f"It is exact{rounding}.")
            else:
                out.print(f"Relative error of the weight update, in Frobenius norm: {lora.error.total:.3g}{rounding}.")
        if format == "diffusers":
            say(f"Load it by pipeline.load_lora_weights({str(path)!r}).")
            return
        allowed = vllm_max_lora_rank(loras[0].config.r)
        if allowed is None:
            out.print("vLLM serves no LoRA of this rank: export with --rank 512 or less, or merge the adapter.")
        else:
            out.print(f"vLLM needs: --max-lora-rank {allowed}")


@app.command(
    epilog=f"""Examples:\n
    {PROGRAM} merge my-base-model my-adapter my-merged-model\n
    {PROGRAM} merge my-base-model my-adapter my-merged-model --dtype bf16 --device cuda"""
)
def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Directory of the base model, or a Hub name.")],
    adapter: Adapter,
    path: Out,
    dtype: Dtype = None,
    device: Annotated[str, typer.Option(callback=check_device, help="Where to compute the merged weights.")] = "cpu",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into a model's checkpoint, shard by shard; about one shard is in memory at a time."""
    with failures_in_a_line(debug):
        from wara_peft.disk.adapters.merge import merge_checkpoint

        merge_checkpoint(
            local_directory(base, weights=True),
            local_directory(adapter),
            path,
            dtype=dtype,
            device=device,
            overwrite=overwrite,
            track=tracked("Merging"),
        )
        compressed = (path / "compression.json").is_file()
        loader = "wara_peft.compression.load_compressed" if compressed else "from_pretrained"
        say(f"Wrote {path}; load it with {loader}.")


@app.command(
    epilog=f"""Examples:\n
    {PROGRAM} compress my-base-model my-small-model --budget 0.6 --texts texts.txt\n
    {PROGRAM} compress my-base-model my-small-model --budget 48MB --solver svd\n
    {PROGRAM} compress my-base-model my-small-model --budget 0.5 --texts texts.txt --statistics my-statistics"""
)
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
    solver: Annotated[
        str, typer.Option(help="svd, fisher, activation, activation-fisher, dictionary or dictionary-oneshot.")
    ] = "activation",
    allocation: Annotated[str, typer.Option(help="uniform, greedy, cost or depth.")] = "greedy",
    texts: Annotated[Path | None, typer.Option(metavar="FILE", help="A text in each line, to calibrate with.")] = None,
    statistics: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take statistics from there, or leave them there.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Layers to compress, by ends of names; may be repeated.")
    ] = None,
    cost: Annotated[str, typer.Option(help="For --allocation cost: flops or bytes.")] = "flops",
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Take statistics anew as layers are compressed.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are run together.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each text that count at most.")] = 512,
    batches: Annotated[int | None, typer.Option(min=1, help="Batches to use at most.")] = None,
    memory: Annotated[int, typer.Option(min=1, metavar="BYTES", help="What statistics may take at a time.")] = 2**31,
    device: Annotated[str, typer.Option(callback=check_device, help="Where the model runs.")] = "cpu",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Compress a model that comes with a tokenizer: factorise its linear layers under a budget."""
    with failures_in_a_line(debug):
        from wara_peft.compression.disk.from_texts import compress_checkpoint

        report = compress_checkpoint(
            local_directory(base, weights=True),
            path,
            budget,
            solver=solver,
            allocation=allocation,  # type: ignore[arg-type]
            texts=texts,
            statistics=statistics,
            target_modules=target,
            cost=cost,
            sequential=sequential,
            batch_size=batch_size,
            length=length,
            batches=batches,
            max_bytes=memory,
            device=device,
            overwrite=overwrite,
            show_progress_bar=err.is_terminal,
        )
        print_compression(report)
        say(f"Wrote {path}; load it with wara_peft.compression.load_compressed.")


@app.command(
    epilog=f"""Examples:\n
    {PROGRAM} inspect my-adapter\n
    {PROGRAM} inspect my-adapter --plot energy.png\n
    {PROGRAM} inspect my-small-model\n
    {PROGRAM} inspect my-adapter --json"""
)
def inspect(
    adapter: Adapter,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw modules x subbands.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Show an adapter's ranks, and its energy by subband and level, or the ranks and losses of a compressed model."""
    with failures_in_a_line(debug):
        if (adapter / "config.json").is_file() and not (adapter / "adapter_config.json").is_file():
            _inspect_compressed(adapter, plot, as_json)
            return
        from wara_peft.disk.adapters.adapter import SavedAdapter
        from wara_peft.inspection.saved_adapter import inspect_adapter

        report = inspect_adapter(SavedAdapter(local_directory(adapter)), tracked("Reading"))
        if plot is not None:
            report.plot(plot)
        if as_json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            print_adapter(report)
        if plot is not None:
            say(f"Wrote {plot}: ranks and shares of energy, modules x subbands.", err if as_json else out)


@app.command(
    context_settings={"allow_interspersed_args": False},
    epilog=f"""Examples:\n
    {PROGRAM} run evaluate.py --adapter my-adapter\n
    {PROGRAM} run -m lm_eval --model hf --model_args pretrained=my-base-model,peft=my-adapter\n
    {PROGRAM} run accelerate launch train.py""",
)
def run(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="A Python script, or any other program.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Handed on as they are.")] = None,
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module, as in python -m.")] = False,
) -> None:
    """Run a program, and all that it starts, in which PEFT loads WaRA adapters though nothing imports wara_peft."""
    with failures_in_a_line(debug=False):
        from .run import command, environment, execute

        execute(command(program, arguments or [], module), environment(os.environ))


def _inspect_compressed(path: Path, plot: Path | None, as_json: bool) -> None:
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
            say(f"{name}: {pairs(sizes)}")


def main() -> None:
    """Entry point of the installed command."""
    app(prog_name=PROGRAM)
