"""Arguments and options of the commands, and what reads their values.

Names that `wara_peft` knows too are written out here, as importing them takes seconds: tests/cli/test_options.py
compares them with its tables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

FileFormat = Literal["peft", "diffusers"]
Solver = Literal["svd", "fisher", "activation", "activation-fisher", "dictionary", "dictionary-oneshot"]
Allocation = Literal["uniform", "greedy", "cost", "depth"]
Cost = Literal["bytes", "flops"]
DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}
"""PyTorch's name of each dtype, by the names that `--dtype` takes."""


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[value]


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name in PyTorch."""
    import torch

    return None if name is None else getattr(torch, name)


def check_device(value: str) -> None:
    """Raise a usage error if PyTorch has no such device; a command calls it, as parsing must not import PyTorch."""
    import torch

    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{value!r}: {str(error).splitlines()[0]}", param_hint="'--device'") from error


def read_budget(value: str) -> float | int | str:
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


def local_directory(path: Path, weights: bool = False) -> Path:
    """The directory itself, or what the Hub has under that name, downloaded, without pickles.

    Raises:
        FileNotFoundError: there is neither.
    """
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        raise FileNotFoundError(f"There is no {'model' if weights else 'adapter'} directory {str(path)!r}.")
    from huggingface_hub import snapshot_download

    patterns = (
        ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"] if weights else ["adapter_*", "pytorch_lora_*"]
    )
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns, ignore_patterns=["*/*", "*.bin"]))
    except Exception as error:  # huggingface_hub raises many kinds, and so does what it asks by
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"There is no directory {str(path)!r}, and the Hub gave nothing of that name: {reason}"
        ) from error
