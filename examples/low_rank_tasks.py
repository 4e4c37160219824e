"""The tasks of train_low_rank.py: a language model of the bytes of docstrings, and a vision transformer on digits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import torch
from docstring_data import load_docstrings
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification

Batch = dict[str, Tensor]


class Task(ABC):
    """A model that is trained from its first values on, and its data.

    Attributes:
        name, metric: what the table calls them.
        higher_is_better: of the metric.
        layers: names of the linear layers that are to be of low rank; all else is dense.
        rank: of the low-rank model, whose parameters the other methods have too.
        steps, batch_size: of training.
        splits: inputs and labels of "train", "validation" and "test".
    """

    name: str
    metric: str
    higher_is_better: bool
    layers: ClassVar[list[str]]
    rank: int
    steps: int
    batch_size: int
    inputs: str
    """The name under which the model takes its inputs."""

    @abstractmethod
    def new_model(self) -> PreTrainedModel:
        """The dense model, of values drawn anew."""

    @property
    @abstractmethod
    def splits(self) -> dict[str, tuple[Tensor, Tensor]]: ...

    @abstractmethod
    def score(self, losses: Tensor, right: Tensor) -> float:
        """The metric, from the loss of each prediction, (N,), and whether its first choice is right, (N,)."""

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end, in an order that the seed decides."""
        inputs, labels = self.splits["train"]
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(labels), generator=generator).split(self.batch_size):
                if len(rows) == self.batch_size:
                    yield {self.inputs: inputs[rows], "labels": labels[rows]}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str, judged: int | None = None) -> float:
        """The metric on a split, or on so many of its first rows."""
        found: list[tuple[Tensor, Tensor]] = []
        for inputs, labels in zip(*(part[:judged].split(64) for part in self.splits[split]), strict=True):
            logits = model(**{self.inputs: inputs}).logits
            if logits.dim() == 3:  # (B, T, V): each position predicts the next one
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            found.append((losses, logits.argmax(-1) == labels))
        losses, right = (torch.cat(parts) for parts in zip(*found, strict=True))
        return self.score(losses, right)


class LanguageModel(Task):
    """A small Llama over the bytes of docstrings."""

    name, metric, higher_is_better = "language model", "perplexity of a byte", False
    layers: ClassVar[list[str]] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rank, steps, batch_size = 16, 240, 8
    inputs = "input_ids"
    length, held_out = 64, 512
    """Bytes in a block, and how many blocks of the validation and of the test texts are used."""

    def new_model(self) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=self.length,
                initializer_range=96**-0.5,  # the default, 0.02, is meant for greater widths
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    @cached_property
    def splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each split the same blocks of bytes, (B, T), as inputs and as labels."""
        data = load_docstrings()
        found = {}
        for split in ("train", "validation", "test"):
            text = "\n".join(example.text for example in getattr(data, split)).encode()
            tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
            blocks = tokens[: len(tokens) // self.length * self.length].view(-1, self.length)
            found[split] = (blocks, blocks) if split == "train" else (blocks[: self.held_out], blocks[: self.held_out])
        return found

    def score(self, losses: Tensor, right: Tensor) -> float:
        return float(losses.double().mean().exp())


class VisionTransformer(Task):
    """A small ViT on scikit-learn's digits, 8 x 8 pixels with noise upon them."""

    name, metric, higher_is_better = "vision transformer", "accuracy in %", True
    layers: ClassVar[list[str]] = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    rank, steps, batch_size = 8, 300, 64
    inputs = "pixel_values"
    noise = 0.35

    def new_model(self) -> ViTForImageClassification:
        return ViTForImageClassification(
            ViTConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=4,
                initializer_range=64**-0.5,  # the default, 0.02, is meant for greater widths
                num_labels=10,
            )
        )

    @cached_property
    def splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Half of the images to train, a quarter to validate and a quarter to test."""
        digits, generator = load_digits(), torch.Generator().manual_seed(0)
        pixels = torch.tensor(digits.images / 8 - 1, dtype=torch.float32).unsqueeze(1)
        pixels += self.noise * torch.randn(pixels.shape, generator=generator)
        order = torch.randperm(len(pixels), generator=generator)
        parts = order.tensor_split((len(order) // 2, len(order) * 3 // 4))
        labels = torch.tensor(digits.target)
        return {
            split: (pixels[part], labels[part])
            for split, part in zip(("train", "validation", "test"), parts, strict=True)
        }

    def score(self, losses: Tensor, right: Tensor) -> float:
        return 100 * float(right.double().mean())


TASKS: tuple[type[Task], ...] = (LanguageModel, VisionTransformer)
