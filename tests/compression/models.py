"""Small models and batches to compress."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return ViTForImageClassification(config).eval()


def batches(count: int = 3, labelled: bool = True) -> list[dict[str, Tensor]]:
    """Of four sequences of eight tokens, whose ends are masked at different lengths."""
    found = []
    for _ in range(count):
        mask = torch.arange(8) < torch.tensor([8, 6, 3, 7])[:, None]
        batch = {"input_ids": torch.randint(3, 40, (4, 8)), "attention_mask": mask.long()}
        found.append({**batch, "labels": torch.randint(3, (4,))} if labelled else batch)
    return found


def for_causal(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{**batch, "labels": batch["input_ids"].where(batch["attention_mask"] > 0, -100)} for batch in found]


class TwoLayers(nn.Module):
    """A hidden layer with a bias and one without."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result
