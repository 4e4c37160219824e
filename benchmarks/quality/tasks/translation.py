"""Task (f): a real language model, SmolLM2-135M-Instruct, learns to translate interface messages."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from chat_pairs import answers, batch_of, encode, loss_per_token
from docstring_data import load_docstrings
from message_data import Pair, language_name, load_messages
from sacrebleu.metrics import CHRF
from smollm2 import load_model, load_tokenizer
from torch import nn

from quality.training import Problem, Rows

LANGUAGES = ("de",)
STEPS, BATCH_SIZE = 60, 12
TRANSLATED = 100
"""Messages of the test split that are translated, for chrF."""
TEXTS, WORDS = 48, 60
"""Docstrings, on which a model that forgets gets worse."""


@lru_cache
def pretrained() -> Any:
    return load_model()


@lru_cache
def tokenizer() -> Any:
    return load_tokenizer()


class TranslationProblem(Problem):
    """A problem whose batches have chats of about one length, and are as long as the longest of them.

    Half of the tokens would be padding otherwise.
    """

    def batches(self) -> Iterator[Rows]:
        rows = self.splits["train"]
        lengths = rows["attention_mask"].sum(1)
        generator = torch.Generator().manual_seed(self.seed)
        left = self.steps
        while left:
            # Among chats of one length the order is random, and so is that of the batches.
            shuffled = torch.randperm(len(lengths), generator=generator)
            parts = shuffled[lengths[shuffled].argsort(stable=True)].split(self.batch_size)
            for index in torch.randperm(len(parts), generator=generator)[:left].tolist():
                left -= 1
                part = parts[index]
                longest = int(lengths[part].max())
                yield {name: tensor[part, :longest] for name, tensor in rows.items()}


def unpadded(rows: Rows) -> list[Any]:
    """Give each row of a split without its padding, as a dict of lists."""
    lengths = rows["attention_mask"].sum(1).tolist()
    return [
        {name: tensor[index, :length].tolist() for name, tensor in rows.items()}
        for index, length in enumerate(lengths)
    ]


def nats_per_token(model: nn.Module, rows: Rows) -> float:
    """Give the mean loss of a token of the translations."""
    return loss_per_token(model, tokenizer(), unpadded(rows))


@lru_cache
def docstrings() -> Rows:
    """Give tokens of English texts about programs, each of which counts with all of its tokens."""
    texts = [text for text, _ in load_docstrings(max_per_class=100, num_words=WORDS).test[:TEXTS]]
    found = tokenizer()(texts, padding=True, return_tensors="pt")
    labels = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": labels}


@lru_cache
def loss_before() -> float:
    """Give the loss on docstrings of the model that nothing has trained."""
    return nats_per_token(pretrained(), docstrings())


@dataclass(frozen=True)
class Translation:
    """Args: the folder of the language in Django's catalogues, such as "de"."""

    language: str
    metric = "nats per token"
    higher_is_better = False
    layers = "linear"
    has_grid = False
    attention = ""

    @property
    def name(self) -> str:
        return f"translation/{self.language}"

    def problem(self, seed: int) -> Problem:
        # The split is the same for all seeds; a seed decides the order of batches and the first values.
        pairs = load_messages(self.language)
        english = language_name(self.language)
        splits = {
            name: dict(batch_of(tokenizer(), encode(tokenizer(), getattr(pairs, name), english)))
            for name in ("train", "validation", "test")
        }
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

        def further(model: nn.Module) -> dict[str, float]:
            return {
                "chrF": chrf(model, pairs.test[:TRANSLATED], english),
                "docstrings_before": loss_before(),
                "docstrings_after": nats_per_token(model, docstrings()),
            }

        return TranslationProblem(
            copy.deepcopy(pretrained()),
            targets,
            [],
            splits,
            BATCH_SIZE,
            STEPS,
            nats_per_token,
            seed,
            further=further,
        )


def chrf(model: nn.Module, pairs: list[Pair], language: str) -> float:
    """Give chrF2 of the model's translations, 0 to 100, as sacrebleu computes it."""
    found = answers(model, tokenizer(), [pair.source for pair in pairs], language)
    return float(CHRF().corpus_score(found, [[pair.target for pair in pairs]]).score)


TASKS = [Translation(language) for language in LANGUAGES]
