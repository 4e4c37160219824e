"""Arguments and options that several commands have, and functions that read their values.

`wara_peft` has tables of some of these names (costs, formats, quantizations, combinations). They are repeated here,
because importing `wara_peft` takes seconds; tests/cli/test_options.py checks that both are the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

FileFormat = Literal["peft", "diffusers", "gguf"]
Engine = Literal["peft", "vllm", "vllm-3d", "sglang", "llama.cpp", "diffusers"]
FORMATS: dict[Engine, FileFormat] = {"llama.cpp": "gguf", "diffusers": "diffusers"}
"""What engines read that do not read PEFT's format."""
BY_EXPERT: tuple[Engine, ...] = ("vllm", "sglang")
"""Engines for which experts get the names of the base model's files."""
Cost = Literal["bytes", "flops"]
Quantization = Literal["nf4", "nf4-double", "int8"]
CombinationType = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}
"""By each name that `--dtype` takes, PyTorch's name of the dtype."""


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[value]


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that has this name in PyTorch; None stays None."""
    import torch

    return None if name is None else getattr(torch, name)


def check_device(value: str) -> None:
    """Raise a usage error if PyTorch has no such device.

    A command calls this function when it runs. As a parser of the option it would import PyTorch for every help text.
    """
    import torch

    try:
        # Only making a tensor finds all mistakes: torch.device accepts "cuda" on a machine without a GPU.
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{value!r}: {str(error).splitlines()[0]}", param_hint="'--device'") from error


def check_wavelet(value: str) -> str:
    """Raise a usage error if `wara_peft` would refuse the wavelet; PyWavelets imports NumPy, and not PyTorch."""
    import pywt

    try:
        is_orthogonal = pywt.Wavelet(value).orthogonal
    except (ValueError, TypeError, AttributeError) as error:
        raise typer.BadParameter(
            f"{value!r} is not a wavelet that PyWavelets knows.", param_hint="'--wavelet'"
        ) from error
    if not is_orthogonal:
        raise typer.BadParameter(
            f"{value!r} is not orthogonal; use one of the families haar, db, sym or coif.", param_hint="'--wavelet'"
        )
    return value


def read_budget(value: str) -> float | int | str:
    """Read a budget: digits are a number of parameters, another number is a share, other text is a size in bytes."""
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
    """The directory itself if it exists, else a directory with the files of the Hub's repository of this name.

    Pickles are not downloaded.

    Args:
        path: a directory, or the name of a repository on the Hub.
        weights: whether a model is wanted; else an adapter.

    Raises:
        FileNotFoundError: there is no such directory, and the Hub gives no repository of this name.
    """
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        raise FileNotFoundError(f"There is no {'model' if weights else 'adapter'} directory {str(path)!r}.")
    from huggingface_hub import snapshot_download

    # These patterns leave out pickles, and weights in formats that are never read here.
    patterns = (
        ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"] if weights else ["adapter_*", "pytorch_lora_*"]
    )
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns, ignore_patterns=["*/*", "*.bin"]))
    except Exception as error:  # huggingface_hub raises errors of many kinds, and so does the HTTP library below it
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"There is no directory {str(path)!r}, and the Hub gave nothing of that name: {reason}"
        ) from error
