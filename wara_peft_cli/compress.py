"""`wara-peft compress`: makes a model smaller by factorising its linear layers."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

import typer

from .interruption import PROGRAM
from .options import Cost, Debug, Out, Overwrite, check_device, local_directory, read_budget
from .tables import print_compression
from .terminal import err, failures_in_a_line, print_message

EXAMPLES = f"""Examples:\n
    {PROGRAM} compress my-base-model my-small-model --budget 0.6 --texts texts.txt\n
    {PROGRAM} compress my-base-model my-small-model --budget 48MB --solver svd\n
    {PROGRAM} compress my-classifier out --budget 0.5 --solver fisher --texts train.csv --evaluate test.csv\n
    {PROGRAM} compress my-base-model my-small-model --budget 0.5 --texts texts.txt --statistics my-statistics\n
    {PROGRAM} compress my-large-model my-smaller-model --budget 0.6 --texts texts.txt --by-block"""

TYPES: dict[str, Any] = {"cost": Cost, "target_modules": list[str]}
"""What options take whose fields take more than a command line can say."""
FLAGS = {"target_modules": "--target"}
"""Options that have another name than their field."""
METAVARS = {"target_modules": "NAME"}


def _methods() -> dict[str, Any]:
    """Give the classes of the methods by name, from their file alone: importing `wara_peft` would import PyTorch."""
    path = Path(__file__).parents[1] / "wara_peft" / "compression" / "methods.py"  # both packages are in one wheel
    spec = cast(Any, spec_from_file_location(f"{__name__}_methods", path))
    module = sys.modules[spec.name] = module_from_spec(spec)  # where dataclasses look for the types of fields
    spec.loader.exec_module(module)
    return cast(dict[str, Any], module.METHODS)


METHODS = _methods()


def _options() -> dict[str, inspect.Parameter]:
    """Give an option for each field of a method, but for the budget. None means that it was left out."""
    found = {}
    for method in METHODS.values():
        types = get_type_hints(method)
        for field in fields(method):
            if field.name in found or field.name == "budget":
                continue
            flag = FLAGS.get(field.name, "--" + field.name.replace("_", "-"))
            kind = TYPES.get(field.name, types[field.name])
            declared = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
            owners = [name for name, other in METHODS.items() if _has(other, field.name)]
            only = f" For --solver {', '.join(owners)}." if len(owners) < len(METHODS) else ""
            option = typer.Option(
                declared,
                help=field.metadata["help"] + only,
                metavar=METAVARS.get(field.name),
                show_default=False if field.default is None else str(field.default).lower(),
            )
            found[field.name] = inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
    return found


def _has(method: Any, name: str) -> bool:
    return name in {field.name for field in fields(method)}


def _given_fields(solver: str, budget: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Give the fields of a method for the options that were given.

    Raises:
        typer.BadParameter: the method has no such field.
    """
    given = {"budget": budget, **{name: value for name, value in options.items() if value is not None}}
    for name in given:
        if not _has(METHODS[solver], name):
            others = [other for other, method in METHODS.items() if _has(method, name)]
            raise typer.BadParameter(
                f"{solver!r} has no such option; {', '.join(map(repr, others))} has.",
                param_hint=f"'--{name.replace('_', '-')}'",
            )
    return given


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
    solver: Annotated[Any, typer.Option(help="What error each layer's factors minimise.")] = "activation",
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
    memory: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="BYTES",
            show_default="2 GiB, or what the largest layer needs",
            help="What statistics may take at a time.",
        ),
    ] = None,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Have the weights of one block in memory; go on where a run was killed.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    overwrite: Overwrite = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Compress a model that comes with a tokenizer: factorise its linear layers under a budget."""
    with failures_in_a_line(debug):
        given = _given_fields(solver, budget, options)
        check_device(device)
        source = local_directory(base, weights=True)
        from wara_peft.compression.disk.from_texts import compress_checkpoint
        from wara_peft.compression.methods import METHODS as LIBRARY

        report = compress_checkpoint(
            source,
            path,
            LIBRARY[solver](**given),
            texts=texts,
            statistics=statistics,
            sequential=sequential,
            evaluate=evaluate,
            batch_size=batch_size,
            length=length,
            batches=batches,
            max_bytes=memory,
            by_block=by_block,
            device=device,
            overwrite=overwrite,
            show_progress_bar=err.is_terminal,
        )
        print_compression(report)
        print_message(f"Wrote {path}; load it with from_pretrained, after `import wara_peft`.")


def _with_options() -> inspect.Signature:
    """Give the signature of `compress` as the command line shows it: with the options of all methods."""
    parameters = dict(inspect.signature(compress, eval_str=True).parameters)
    del parameters["options"]
    solver = typer.Option(help="What error each layer's factors minimise.")
    parameters["solver"] = parameters["solver"].replace(annotation=Annotated[Literal[tuple(METHODS)], solver])
    names = list(parameters)
    after = names.index("solver") + 1
    ordered = [*names[:after], *_options(), *names[after:]]
    all_of_them = {**parameters, **_options()}
    return inspect.Signature([all_of_them[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in ordered])


compress.__signature__ = _with_options()  # type: ignore[attr-defined]
