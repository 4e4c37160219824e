"""Task (c): a small Llama that was pretrained on the docstrings of half the libraries reads those of another one."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from docstring_data import LIBRARIES, load_docstrings
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from quality.tasks.pretrained import cached
from quality.training import Problem, Rows, mean_loss

PRETRAINING_LIBRARIES = sorted(LIBRARIES)[::2]
NEW_LIBRARIES = ("sympy", "pandas")
TEXTS, WORDS = 400, 60
VOCABULARY, LENGTH = 1500, 64
PRETRAINING_STEPS, PRETRAINING_RATE = 800, 2e-3
TRAIN, VALIDATION, TEST = 120, 40, 80
"""Sequences of `LENGTH` tokens."""
STEPS, BATCH_SIZE = 80, 8


@lru_cache
def texts() -> dict[str, list[str]]:
    """Docstrings by library."""
    data = load_docstrings(max_per_class=TEXTS, num_words=WORDS)
    found: dict[str, list[str]] = {name: [] for name in data.label_names}
    for text, label in sorted((*data.train, *data.validation, *data.test)):
        found[data.label_names[label]].append(text)
    return found


def new_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def sequences(tokenizer: Any, library_texts: list[str], generator: torch.Generator) -> Tensor:
    """(N, 64) tokens: the texts in random order, one after the other, with a line's end between them."""
    order = torch.randperm(len(library_texts), generator=generator).tolist()
    tokens = [token for index in order for token in tokenizer.encode(library_texts[index] + "\n").ids]
    return torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)


def pretrain() -> dict[str, Any]:
    """The weights, and the tokenizer as JSON."""
    library_texts = [text for name in PRETRAINING_LIBRARIES for text in texts()[name]]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(library_texts, VOCABULARY, show_progress=False)
    torch.manual_seed(0)
    model = new_llama()
    rows = sequences(tokenizer, library_texts, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAINING_RATE, total_steps=PRETRAINING_STEPS)
    for _ in tqdm(range(PRETRAINING_STEPS), desc="pretraining of a Llama", leave=False):
        batch = rows[torch.randint(len(rows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {"weights": model.state_dict(), "tokenizer": tokenizer.to_str()}


@lru_cache
def pretrained_llama() -> tuple[LlamaForCausalLM, Tokenizer]:
    found = cached("llama", pretrain)
    model = new_llama()
    model.load_state_dict(found["weights"])
    return model, Tokenizer.from_str(found["tokenizer"])


def perplexity(model: nn.Module, rows: Rows) -> float:
    """exp of the mean loss of a token; all sequences are of one length."""
    loss = mean_loss(model, rows, batch_size=20)
    return math.exp(loss) if loss < 100 else math.inf


@dataclass(frozen=True)
class Language:
    """Args: the library that is new."""

    library: str
    metric = "perplexity"
    higher_is_better = False
    layers = "linear"
    has_grid = False
    attention = ""

    @property
    def name(self) -> str:
        return f"language/{self.library}"

    def problem(self, seed: int) -> Problem:
        base, tokenizer = pretrained_llama()
        rows = sequences(tokenizer, texts()[self.library], torch.Generator().manual_seed(seed))
        parts = dict(
            zip(
                ("train", "validation", "test"),
                rows[: TRAIN + VALIDATION + TEST].split([TRAIN, VALIDATION, TEST]),
                strict=True,
            )
        )
        splits = {name: {"input_ids": part, "labels": part} for name, part in parts.items()}
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return Problem(copy.deepcopy(base), targets, [], splits, BATCH_SIZE, STEPS, perplexity, seed)


TASKS = [Language(library) for library in NEW_LIBRARIES]
