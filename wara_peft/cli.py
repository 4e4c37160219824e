"""The `wara-peft` command: export an adapter to LoRA, merge it, look into it, compress a model, run programs with it.

Each subcommand imports what it needs when it runs, so that what one of them uses cannot stop the others. All text that
comes from elsewhere (paths, names in files, errors) is printed as it is, with control characters as escapes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

if TYPE_CHECKING:
    from .compression import CompressionReport
    from .disk.adapter import Track
    from .inspection import AdapterReport

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
PROGRAM = "wara-peft"
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
app = typer.Typer(
    name=PROGRAM,
    help="Export, merge and inspect WaRA adapters without the base model in memory, or run a program that loads them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _dtype(value: str) -> torch.dtype:
    if value not in DTYPES:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[value]


def _device(value: str) -> str:
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{value!r}: {str(error).splitlines()[0]}") from error
    return value


def _budget(value: str) -> float | int | str:
    """A share if it has a point, a number of parameters if it has digits alone, else bytes."""
    if re.fullmatch(r"\d+", value):
        return int(value)
    try:
        return float(value)
    except ValueError:
        return value


Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory of a saved WaRA adapter, or a Hub name.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write. It is empty until it is complete.")]
Dtype = Annotated[
    Any, typer.Option("--dtype", parser=_dtype, metavar="|".join(DTYPES), help="Dtype to write; as it is if left out.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")]
Debug = Annotated[bool, typer.Option("--debug", help="On failure show the whole traceback.")]


@app.command(
    epilog=f"""Examples:\n
    {PROGRAM} export my-adapter my-lora\n
    {PROGRAM} export my-adapter my-lora --dtype bf16 --strict\n
    {PROGRAM} export my-adapter my-lora --rank 8\n
    {PROGRAM} export my-adapter my-lora --energy 0.99\n
    {PROGRAM} export my-nested-adapter my-lora --prefix 8\n
    {PROGRAM} export unet-adapter text-adapter my-lora --format diffusers"""
)
def export(
    adapters: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER",
            help="Directory of a saved WaRA adapter, or a Hub name; one a component for diffusers.",
        ),
    ],
    path: Out,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Best approximation of this rank; exact if left out.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Smallest rank that keeps this share of every module's energy, as 0.99."),
    ] = None,
    prefix: Annotated[
        int | None, typer.Option(min=1, help="The first so many components, of an adapter with ordered_dropout.")
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
    if sum(given is not None for given in (rank, energy, prefix)) > 1:
        raise typer.BadParameter("give one of --rank, --energy and --prefix.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise typer.BadParameter(f"--energy {energy} is a share: more than 0, at most 1.")
    if format == "peft" and (component or len(adapters) > 1):
        raise typer.BadParameter("several adapters, and --component, are for --format diffusers.")
    if component and len(component) != len(adapters):
        raise typer.BadParameter(f"give --component once for each of the {len(adapters)} adapters, in their order.")
    with _failures_in_a_line(debug):
        from .disk.directory import written_at_once
        from .export import convert, vllm_max_lora_rank, write_loras

        sources = [_local(adapter) for adapter in adapters]
        names: list[str | None] = [*component] if component else [None] * len(sources)
        kept = energy if rank is None else rank
        to_format = partial(convert, rank=kept, prefix=prefix, dtype=dtype, strict=strict, format=format)
        with written_at_once(path, "replace" if overwrite else "refuse", inputs=sources) as directory:
            loras = [
                to_format(source, component=name, track=_tracked("Exporting"))
                for source, name in zip(sources, names, strict=True)
            ]
            write_loras(directory, loras)
        for lora in loras:
            of_component = f" of {lora.component}" if lora.component else ""
            modules = len(lora.config.target_modules or ())
            parameters = len(lora.config.target_parameters or ())
            beside = f" and {parameters} parameters" if parameters else ""
            _say(f"Wrote {path}: LoRA of rank {lora.config.r}, {modules} modules{beside}{of_component}.")
            rounding = f", but for the rounding to {str(dtype).removeprefix('torch.')}" if lora.rounded else ""
            if prefix is not None:
                out.print(f"It is the first {prefix} components of each module{rounding}.")
            elif kept is None:
                out.print(f"It is exact{rounding}.")
            else:
                out.print(f"Relative error of the weight update, in Frobenius norm: {lora.error.total:.3g}{rounding}.")
        if format == "diffusers":
            _say(f"Load it by pipeline.load_lora_weights({str(path)!r}).")
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
    device: Annotated[str, typer.Option(callback=_device, help="Where to compute the merged weights.")] = "cpu",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into a model's checkpoint, shard by shard; about one shard is in memory at a time."""
    with _failures_in_a_line(debug):
        from .disk.merge import merge_checkpoint

        merge_checkpoint(
            _local(base, weights=True),
            _local(adapter),
            path,
            dtype=dtype,
            device=device,
            overwrite=overwrite,
            track=_tracked("Merging"),
        )
        compressed = (path / "compression.json").is_file()
        loader = "wara_peft.compression.load_compressed" if compressed else "from_pretrained"
        _say(f"Wrote {path}; load it with {loader}.")


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
            parser=_budget,
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
    cost: Annotated[str, typer.Option(help="For --allocation cost: flops, bytes or latency.")] = "flops",
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Take statistics anew as layers are compressed.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are run together.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each text that count at most.")] = 512,
    batches: Annotated[int | None, typer.Option(min=1, help="Batches to use at most.")] = None,
    memory: Annotated[int, typer.Option(min=1, metavar="BYTES", help="What statistics may take at a time.")] = 2**31,
    device: Annotated[str, typer.Option(callback=_device, help="Where the model runs.")] = "cpu",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Compress a model that comes with a tokenizer: factorise its linear layers under a budget."""
    with _failures_in_a_line(debug):
        from .compression.checkpoint import compress_checkpoint

        report = compress_checkpoint(
            _local(base, weights=True),
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
        _print_compression(report)
        _say(f"Wrote {path}; load it with wara_peft.compression.load_compressed.")


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
    with _failures_in_a_line(debug):
        if (adapter / "config.json").is_file() and not (adapter / "adapter_config.json").is_file():
            _inspect_compressed(adapter, plot, as_json)
            return
        from .disk.adapter import SavedAdapter
        from .inspection import inspect_adapter

        report = inspect_adapter(SavedAdapter(_local(adapter)), _tracked("Reading"))
        if plot is not None:
            report.plot(plot)
        if as_json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            _print_report(report)


@app.command(
    context_settings={"allow_interspersed_args": False},
    epilog=f"""Examples:\n
    {PROGRAM} run evaluate.py --adapter my-adapter\n
    {PROGRAM} run -m lm_eval --model hf --model_args pretrained=my-base-model,peft=my-adapter\n
    {PROGRAM} run accelerate launch train.py""",
)
def run(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="A Python script, or a command such as trl.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Handed on as they are.")] = None,
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module, as in python -m.")] = False,
) -> None:
    """Run a program, and all that it starts, in which PEFT loads WaRA adapters though nothing imports wara_peft."""
    with _failures_in_a_line(debug=False):
        from .running import command, environment

        words = command(program, arguments or [], module)
        os.execve(words[0], words, environment(os.environ))  # its exit code, signals and tracebacks are its own


def _inspect_compressed(path: Path, plot: Path | None, as_json: bool) -> None:
    from .compression.saving import saved_layers, saved_report

    if plot is not None:
        raise ValueError(f"{str(path)!r} is a compressed model, which has no subbands to plot.")
    report, layers = saved_report(path), saved_layers(path)
    if as_json:
        print(json.dumps({"layers": layers, "report": report and report.as_dict()}, indent=2))
    elif report is not None:
        _print_compression(report, layers)
    else:
        for name, sizes in layers.items():
            _say(f"{name}: {_pairs(sizes)}")


def _print_compression(report: CompressionReport, now: Mapping[str, Mapping[str, object]] | None = None) -> None:
    """What compressing did, and where a layer has another rank since, as by merging an adapter, that rank."""
    table = Table(Column("layer", overflow="fold"), "out x in", "rank", "parameters", "before", "lost")
    for layer in report.layers:
        values = "" if layer.nonzeros is None else f", {layer.nonzeros} values a row"
        if now is not None and layer.rank is not None:
            sizes = now.get(layer.name, {})
            rank = sizes.get("rank", sizes.get("atoms", "dense"))
            values += "" if rank == layer.rank else f", now {rank}"
        table.add_row(
            _visible(layer.name),
            f"{layer.shape[0]} x {layer.shape[1]}",
            f"dense: {_visible(layer.reason)}" if layer.rank is None else f"{layer.rank}{values}",
            f"{layer.parameters_after:,}",
            f"{layer.parameters_before:,}",
            f"{layer.lost:.2%}",
        )
    out.print(table)
    for name, reason in report.left.items():
        _say(f"{name} is left as it is: {reason}.")
    _say(report.summary)


def _print_report(report: AdapterReport) -> None:
    _say(f"form={report.form}, wavelet={report.wavelet}, levels={report.levels}, base model: {report.base_model}")
    table = Table(Column("module", overflow="fold"), "kind", "out x in", "ranks", "R", "trained", "as LoRA")
    for module in report.modules:
        ranks = set(module.ranks.values())
        table.add_row(
            _visible(module.name),
            module.kind,
            f"{module.out_features} x {module.in_features}",
            f"{ranks.pop()} in each of {len(module.ranks)}" if len(ranks) == 1 else _pairs(module.ranks),
            str(module.rank),
            f"{module.parameters:,}",
            "none" if module.lora_parameters is None else f"{module.lora_parameters:,}",
        )
    out.print(table)
    parameters = sum(module.parameters for module in report.modules)
    lora = report.lora_parameters
    as_lora = "it mixes tokens, and is no LoRA" if lora is None else f"as LoRA of rank {report.rank}: {lora:,}"
    out.print(f"{len(report.modules)} modules, {parameters:,} trained parameters; {as_lora}.")
    shares = Table("subband", "share of energy")
    for name, share in (*report.energy_shares().items(), *report.level_shares().items()):
        shares.add_row(name, f"{share:.1%}")
    out.print(shares)
    if report.others:
        _say(f"It also holds, in full: {', '.join(report.others)}")


def _pairs(values: Mapping[str, object]) -> str:
    return " ".join(f"{name}:{value}" for name, value in values.items())


def _tracked(description: str) -> Track:
    """A progress bar, on a terminal."""
    return partial(track, description=description, console=err, transient=True, disable=not err.is_terminal)


def _local(path: Path, weights: bool = False) -> Path:
    """The directory itself, or what the Hub has under that name, downloaded, without pickles."""
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        return path
    from huggingface_hub import snapshot_download

    patterns = (
        ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"] if weights else ["adapter_*", "pytorch_lora_*"]
    )
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns, ignore_patterns=["*/*", "*.bin"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"There is no directory {str(path)!r}, and the Hub gave nothing of that name: {reason}"
        ) from error


@contextmanager
def _failures_in_a_line(debug: bool) -> Iterator[None]:
    """Turn an exception into one line and exit status 1, and the signal to terminate into an exception."""
    interrupted = False

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True  # what a library makes of the exception may be another one
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("always", UserWarning)
            yield
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            for line in traceback.format_exc().splitlines():
                err.print(_visible(line))
        else:
            interrupted = interrupted or isinstance(error, KeyboardInterrupt)
            reason = "interrupted; nothing was written." if interrupted else str(error)
            _complain(reason or type(error).__name__)
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(f"warning: {message}")


def _complain(text: str) -> None:
    err.print(f"{PROGRAM}: {_visible(' '.join(text.split()))}")


def _say(text: str) -> None:
    out.print(_visible(text), soft_wrap=True)


def _visible(text: str) -> str:
    """The text with escapes in place of characters that a terminal would obey, or that no encoding has."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def main() -> None:
    """Entry point of the installed command."""
    app(prog_name=PROGRAM)
