"""`wara-peft merge`: adds an adapter to the checkpoint of its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .interruption import PROGRAM
from .options import Adapter, Debug, Dtype, Out, Overwrite, Quantization, check_device, local_directory, torch_dtype
from .terminal import failures_in_a_line, print_message, progress_bar

EXAMPLES = f"""Examples:\n
    {PROGRAM} merge my-base-model my-adapter my-merged-model\n
    {PROGRAM} merge my-base-model my-adapter my-merged-model --dtype bf16 --device cuda\n
    {PROGRAM} merge my-4-bit-model my-adapter my-merged-model --dequantize\n
    {PROGRAM} merge my-base-model my-adapter my-merged-model --dequantize --quantization nf4"""


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Directory of the base model, or a Hub name.")],
    adapter: Adapter,
    path: Out,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Dequantize BASE, beside whose 4-bit or 8-bit weights it was trained.")
    ] = False,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="With --dequantize and a 16-bit BASE: how BASE was quantized when the adapter was trained."),
    ] = None,
    dtype: Dtype = None,
    device: Annotated[str, typer.Option(help="Where to compute the merged weights.")] = "cpu",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into a model's checkpoint, shard by shard; about one shard is in memory at a time."""
    with failures_in_a_line(debug):
        check_device(device)
        sources = local_directory(base, weights=True), local_directory(adapter)
        from wara_peft.disk.adapters.merge import merge_checkpoint

        merge_checkpoint(
            *sources,
            path,
            dequantize=dequantize,
            quantization=quantization,
            dtype=torch_dtype(dtype),
            device=device,
            overwrite=overwrite,
            track=progress_bar("Merging"),
        )
        # A compressed base stays compressed, and transformers alone cannot load its factorised layers.
        compressed = (path / "compression.json").is_file()
        loader = "wara_peft.compression.load_compressed" if compressed else "from_pretrained"
        print_message(f"Wrote {path}; load it with {loader}.")
