"""A Llama of one layer with a chat template, as a local folder that examples load with `--model`."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH, HIDDEN = 32, 64
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token; "<|end|>" ends a turn."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [], BpeTrainer(special_tokens=["<|end|>", "<|start|>"], initial_alphabet=ByteLevel.alphabet())
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    fast.chat_template = chat_template
    return fast


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=258, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, **heads, **ids
    )
    return LlamaForCausalLM(config)


def save(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    tokenizer(chat_template).save_pretrained(folder)
    model().save_pretrained(folder)
    return folder
