"""Arguments and options that several commands have, and what reads their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def _dtype(value: str) -> torch.dtype:
    if value not in DTYPES:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[value]


def check_device(value: str) -> str:
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{value!r}: {str(error).splitlines()[0]}") from error
    return value


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
