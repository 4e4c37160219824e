"""Writes a LoRA as a GGUF adapter, which llama.cpp and Ollama load beside a base model in GGUF.

For a base weight such as "blk.0.attn_q.weight" the file holds ".lora_a" of shape (R, n) and ".lora_b" of shape (m, R),
and llama.cpp adds alpha / R · lora_b lora_a to the weight, with R the number of columns of that lora_b.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from ..disk.adapters.contents import PEFT_PREFIX
from .gguf_base import GgufBase, import_gguf


def write_adapter(
    file: Path, config: LoraConfig, state_dict: Mapping[str, Tensor], base: GgufBase, tensor_names: Mapping[str, str]
) -> None:
    """Write a LoRA as a GGUF adapter.

    Args:
        file: the file to write; it is replaced if it is there.
        config, state_dict: the LoRA, as `to_lora` returns it.
        base: the base model.
        tensor_names: GGUF's name of each adapted module's weight, as `base.tensor_names` returns them.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(file, base.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config.lora_alpha))
        for module, tensor in tensor_names.items():
            lora_a, lora_b = (state_dict[f"{PEFT_PREFIX}{module}.lora_{side}.weight"].cpu() for side in "AB")
            for side, value in (("a", lora_a), ("b", rows_as_in_gguf(lora_b, tensor, base))):
                is_bf16 = value.dtype == torch.bfloat16  # which NumPy lacks
                writer.add_tensor(
                    f"{tensor}.lora_{side}",
                    (value.view(torch.uint8) if is_bf16 else value).numpy(),
                    raw_dtype=gguf.GGMLQuantizationType.BF16 if is_bf16 else None,
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def rows_as_in_gguf(rows: Tensor, tensor: str, base: GgufBase) -> Tensor:
    """Put the rows of a weight, or of lora_B, in the order that the weight has in GGUF.

    transformers rotates feature i of a head together with feature i + d / 2, and llama.cpp's architecture "llama"
    feature 2 i together with 2 i + 1. So in GGUF the halves of each head of q and k are interleaved. The other
    architectures keep transformers' order.
    """
    part = re.search(r"\.(attn_[qk])\.weight$", tensor)
    if base.architecture != "llama" or part is None:
        return rows
    halves = rows.reshape(base.heads[part[1]], 2, -1, rows.shape[1])  # (heads, 2, d / 2, R)
    return halves.transpose(1, 2).reshape(rows.shape)


def modelfile(adapter: Path, base: Path) -> str:
    """Give the text of Ollama's Modelfile for a GGUF adapter on a base: a GGUF file, or a model's directory."""
    return f"FROM {base.absolute()}\nADAPTER ./{adapter.name}\n"
