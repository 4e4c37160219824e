"""`wara-peft combine`: writes a LoRA that combines saved adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .interruption import PROGRAM
from .options import CombinationType, Debug, Dtype, Overwrite, check_device, local_directory, torch_dtype
from .terminal import failures_in_a_line, out, print_message, progress_bar

EXAMPLES = f"""Examples:\n
    {PROGRAM} combine my-adapter my-other-adapter my-lora --weights 0.7,0.3\n
    {PROGRAM} combine my-adapter my-other-adapter my-lora -w 0.7,0.3 --type cat --dtype bf16\n
    {PROGRAM} combine my-adapter my-other-adapter my-lora -w 1,-0.5 --type ties_svd --density 0.3"""


def _numbers(value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a list of numbers such as 0.7,0.3.") from None


def combine(
    context: typer.Context,
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ADAPTER",
            help="Directory of a saved WaRA adapter or LoRA, or a Hub name; all of one base model.",
            show_default=False,
        ),
    ] = None,
    *,
    path: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write. It is empty until it is complete.")],
    weights: Annotated[
        Any,
        typer.Option(
            "--weights", "-w", parser=_numbers, metavar="W,W,...", help="One for each ADAPTER, in their order."
        ),
    ],
    combination_type: Annotated[
        CombinationType,
        typer.Option(
            "--type",
            help="How. cat is the exact weighted sum, and adds up the ranks; svd is nearest to it at one rank.",
        ),
    ] = "svd",
    svd_rank: Annotated[
        int | None,
        typer.Option(min=1, help="For types with svd: rank to write; the largest of all if left out."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="For ties, dare and magnitude_prune: share of the values to keep, as 0.3."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For dare: decides which values are dropped.")] = 0,
    dtype: Dtype = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Combine adapters, WaRA or LoRA, into one LoRA, as PEFT's add_weighted_adapter does in a model."""
    # The adapters have a default, so typer gives a single word to OUT. The user meant an adapter, and OUT is missing.
    if not sources:
        context.fail("Missing argument 'OUT'.")
    if len(weights) != len(sources):
        raise typer.BadParameter(
            f"give one weight for each ADAPTER before OUT: there are {len(weights)}, and {len(sources)} adapters.",
            param_hint="'--weights' / '-w'",
        )
    with failures_in_a_line(debug):
        check_device(device)
        adapters = [local_directory(source) for source in sources]
        from wara_peft.lora.combine_saved import combine_adapters

        combination = combine_adapters(
            adapters,
            weights,
            path,
            combination_type,
            svd_rank=svd_rank,
            density=density,
            seed=seed,
            dtype=torch_dtype(dtype),
            device=device,
            overwrite=overwrite,
            track=progress_bar("Combining"),
        )
        config, error = combination.config, combination.error
        print_message(f"Wrote {path}: LoRA of rank {config.r}, {len(config.target_modules or ())} modules.")
        rounding = f", but for the rounding to {dtype}" if combination.rounded else ""
        if error == 0:
            out.print(f"It is the exact weighted sum of the weight updates{rounding}.")
        elif error is not None:
            out.print(f"Relative error of the weighted sum, in Frobenius norm: {error:.3g}{rounding}.")
        print_message(f"Load it by PeftModel.from_pretrained(model, {str(path)!r}).")
