"""Task (b): MiniLM tells from few texts which of twenty libraries a docstring comes from, its name being masked."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import lru_cache

import torch
from attention_texts import Split, subword_splits
from classify_text import BUNDLED_MODEL, MeanPoolingClassifier, build_model
from docstring_data import load_docstrings

from quality.training import Problem, accuracy

MAX_LENGTH = 32
CLASSES = 20
PER_CLASS = 8
VALIDATION, TEST = 200, 400
STEPS, BATCH_SIZE = 60, 8


@lru_cache
def splits() -> dict[str, Split]:
    """All texts as tokens: 100 of each library to train, 20 to validate and 30 to test."""
    data = load_docstrings()
    return subword_splits({"train": data.train, "validation": data.validation, "test": data.test}, MAX_LENGTH)


@lru_cache
def encoder_with_head() -> MeanPoolingClassifier:
    return build_model(BUNDLED_MODEL, CLASSES, seed=0)


def of_each_class(labels: torch.Tensor, number: int, seed: int) -> torch.Tensor:
    """Rows with so many of each class."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    rows = torch.tensor(order)
    return torch.cat([rows[labels[rows] == label][:number] for label in range(CLASSES)])


@dataclass(frozen=True)
class Docstrings:
    metric = "accuracy"
    higher_is_better = True
    layers = "linear"
    has_grid = False
    attention = ""
    name = "docstrings/8 a class"

    def problem(self, seed: int) -> Problem:
        model = copy.deepcopy(encoder_with_head())
        torch.manual_seed(seed)
        model.classifier.reset_parameters()
        rows = {}
        for name, split in splits().items():
            number = {"train": PER_CLASS, "validation": VALIDATION // CLASSES, "test": TEST // CLASSES}[name]
            chosen = of_each_class(split.labels, number, seed)
            rows[name] = {
                "input_ids": split.inputs[chosen],
                "attention_mask": (~split.padding[chosen]).long(),
                "labels": split.labels[chosen],
            }
        targets = ["query", "key", "value", "dense"]
        return Problem(model, targets, ["classifier"], rows, BATCH_SIZE, STEPS, accuracy, seed)


TASKS = [Docstrings()]
