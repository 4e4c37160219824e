"""Models that transformers goes on calling quantized although it has dequantized them."""

from __future__ import annotations

from torch import nn


def unmark_dequantized(model: nn.Module) -> None:
    """Let transformers train and save a model that it loaded from a GGUF file and dequantized while loading.

    transformers goes on calling such a model quantized, although all its weights are floats: `Trainer` refuses it, and
    so does `save_pretrained` ("not serializable"), also after a merge. So this takes the mark away. A model whose
    weights have stayed in GGUF's blocks keeps it.

    Args:
        model: any module; only models of transformers in it change.
    """
    for module in model.modules():
        quantizer = vars(module).get("hf_quantizer")
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
        if quantizer is not None and method == "gguf" and not getattr(quantizer, "packed_modules", None):
            quantizer.remove_quantization_config(module)
