"""Small models written as GGUF, and llama.cpp itself, which computes with them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
"""The smallest vocabulary that llama.cpp takes: single bytes."""
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
IN_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make(name: str) -> PreTrainedModel:
    """A model of random weights, also those that transformers would make zeros and ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def name_in_gguf(key: str) -> str:
    """As the format's documentation has them: of `model.layers.1.mlp.up_proj.weight`, `blk.1.ffn_up.weight`."""
    module, _, parameter = key.rpartition(".")
    block = re.match(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{block[1]}.{IN_GGUF[block[2]]}.{parameter}" if block else f"{IN_GGUF[module]}.{parameter}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Feature i of each head goes to 2 i, and feature i + d / 2 to 2 i + 1."""
    result = np.empty_like(rows)
    size = len(rows) // heads
    for start in range(0, len(rows), size):
        result[start : start + size : 2] = rows[start : start + size // 2]
        result[start + 1 : start + size : 2] = rows[start + size // 2 : start + size]
    return result


def write_base(path: Path, model: PreTrainedModel, updates: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write a model as a GGUF file, with something added to the tensors that `updates` names."""
    config = model.config
    kind = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([2, 3, 3, *[6] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        if kind == "llama" and ".q_proj." in key:
            array = interleaved(array, config.num_attention_heads)
        elif kind == "llama" and ".k_proj." in key:
            array = interleaved(array, config.num_key_value_heads)
        writer.add_tensor(name_in_gguf(key), array + (updates or {}).get(name_in_gguf(key), np.float32(0)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file in float32, with rows as in PyTorch."""
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


def most_likely(base: Path, adapter: Path | None, prompt: list[int], count: int = 20) -> dict[int, float]:
    """What llama.cpp says: log-probabilities of the tokens that are the most likely after a prompt."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(base)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 128, 1, 0
    parameters.warmup, parameters.verbosity = False, 1
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions({"prompt": prompt, "max_tokens": 1, "temperature": 0, "n_probs": count})
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
