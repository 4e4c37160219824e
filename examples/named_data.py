"""Data sets of the Hugging Face Hub, or of a local folder: labelled texts, and pairs of texts."""

from __future__ import annotations

import random

from datasets import load_dataset
from docstring_data import LabelledText
from message_data import Pair, Splits, split


def load_named_data(
    name: str, config: str | None, text_column: str, label_column: str, seed: int
) -> tuple[dict[str, list[LabelledText]], int]:
    """Return the examples of the splits `train`, `validation` and `test`, and the number of labels.

    Labels are numbered in their sorted order; rows without one are left out. Where there is no labelled test split,
    `validation` takes its place; what is then missing is a tenth of `train`.

    Args:
        name: data set on the Hub, or a local folder with files such as train.csv and test.csv.
        config: which configuration of the data set, if it has several.
        text_column: column with the text.
        label_column: column with the label, of any type that can be sorted.
        seed: seed of the order of `train`.

    Raises:
        ValueError: a column or the split `train` is missing, or there is too little to train and test with.
        OSError, RuntimeError: the data set cannot be found or read; from `datasets.load_dataset`.
    """
    loaded = load_dataset(name, config)
    if "train" not in loaded:
        raise ValueError(f"{name} has no split named train, only {', '.join(loaded)}")
    columns = loaded["train"].column_names
    for kind, column in (("text", text_column), ("label", label_column)):
        if column not in columns:
            raise ValueError(f"{name} has no {kind} column {column!r}; its columns are {', '.join(columns)}")

    # Competition data hide the labels of their test split behind -1.
    labels = sorted(set(loaded["train"][label_column]) - {None, -1})
    index = {label: i for i, label in enumerate(labels)}
    splits = {
        split_name: [
            LabelledText(str(text), index[label])
            for text, label in zip(split[text_column], split[label_column], strict=True)
            if label in index
        ]
        for split_name, split in loaded.items()
    }
    train = splits["train"]
    if len(labels) < 2 or len(train) < 20:
        raise ValueError(f"{name} has {len(train)} labelled texts and {len(labels)} labels; 20 and 2 are the least")
    random.Random(seed).shuffle(train)
    if not splits.get("test"):
        splits["test"] = splits.pop("validation", [])
    for missing in ("validation", "test"):
        if not splits.get(missing):
            size = len(train) // 10
            splits[missing], train[-size:] = train[-size:], []
    return splits, len(labels)


def load_named_pairs(name: str, config: str | None, source: str, target: str, seed: int) -> Splits:
    """Return the pairs of the split `train`, shuffled and split by `message_data.split`; each source counts once.

    Args:
        name: data set on the Hub, or a local folder with files such as train.csv.
        config: which configuration of the data set, if it has several.
        source, target: columns with the texts, or keys of the dicts in a column named `translation`.
        seed: seed of the order.

    Raises:
        ValueError: a column or the split `train` is missing, or there are too few pairs to train and test with.
        OSError, RuntimeError: the data set cannot be found or read; from `datasets.load_dataset`.
    """
    loaded = load_dataset(name, config)
    if "train" not in loaded:
        raise ValueError(f"{name} has no split named train, only {', '.join(loaded)}")
    rows = loaded["train"]
    columns = rows.column_names
    if "translation" in columns and not {source, target} <= set(columns):
        rows = rows["translation"]
        columns = list(rows[0])
    for column in (source, target):
        if column not in columns:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(columns)}")
    found: dict[str, str] = {}
    for row in rows:
        if row[source] and row[target]:
            found.setdefault(str(row[source]), str(row[target]))
    if len(found) < 20:
        raise ValueError(f"{name} has {len(found)} pairs; 20 are the least")
    pairs = [Pair(*pair) for pair in found.items()]
    random.Random(seed).shuffle(pairs)
    return split(pairs)
