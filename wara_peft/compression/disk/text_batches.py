"""Making batches of texts for a saved model: tokens, masks, and labels where the model can have some."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from .text_files import LABEL, TEXT, Texts

Batch = dict[str, Tensor]
IGNORED = -100
"""The label that losses of transformers ignore."""


class TextBatches:
    """Makes batches of texts as one model takes them.

    A decoder gets blocks: all texts one after the other, each with the end token, cut into pieces of `length` tokens.
    So nothing is padded, and only a last single token is lost. Any other model gets one text in each row. A text
    without a label that is too long goes on in the next row, if the tokenizer can do that. A text with a label is cut.

    Args:
        directory: the model's directory, with its tokenizer.
        config: the model's config.
        model_class: the model's class.
        batch_size: how many blocks or rows run together.
        length: how many tokens a block or row has at most.

    Attributes:
        predicts_tokens: whether the model's loss is that of the texts' own tokens.
        classifies: whether the model's loss is that of one label for each text.

    Raises:
        ValueError: `directory` has no tokenizer that can be loaded, or `length` is too small.
    """

    def __init__(
        self,
        directory: Path,
        config: PreTrainedConfig,
        model_class: type[PreTrainedModel],
        batch_size: int,
        length: int,
    ) -> None:
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds where files are missing or broken
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{str(directory)!r} has no tokenizer: {type(error).__name__}: {reason}") from error
        self.config, self.class_name, self.batch_size = config, model_class.__name__, batch_size
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or length
        self.length = min(length, longest, tokenizer.model_max_length)
        self._is_decoder = self.class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self._is_seq2seq = self.class_name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
        self.predicts_tokens = self._is_decoder or self._is_seq2seq
        self.classifies = self.class_name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
        least = 2 if self._is_decoder else 1 + tokenizer.num_special_tokens_to_add()
        if self.length < least:
            raise ValueError(f"length={self.length} must be at least {least}, so that a token is there to learn from.")
        # Padding takes a token of the tokenizer, and classifiers that are decoders find it by the id in their config.
        has_padding = None not in (tokenizer.pad_token, getattr(config.get_text_config(), "pad_token_id", None))
        self._rows_together = batch_size if has_padding else 1
        self._tokenizer = tokenizer
        self._arguments = inspect.signature(model_class.forward).parameters

    @property
    def is_regression(self) -> bool:
        """Whether a label is a number to estimate."""
        return self.config.problem_type == "regression" or (
            self.config.problem_type is None and self.config.num_labels == 1
        )

    def check_loss(self, data: Texts, why: str) -> None:
        """Refuse texts for which the model has no loss.

        Args:
            data: the texts.
            why: what needs the loss, for the message.

        Raises:
            ValueError: the model does not predict tokens, and there are no labels or it is no classifier of texts.
        """
        if self.predicts_tokens or (self.classifies and data.labels is not None):
            return
        if self.classifies:
            raise ValueError(
                f"{why} needs labels, as {self.class_name} classifies texts: give JSON lines or CSV with columns "
                f"{TEXT!r} and {LABEL!r} in place of {str(data.path)!r}."
            )
        raise ValueError(f"{why} needs a loss, and {self.class_name} has none for texts, with labels or without.")

    def __call__(self, data: Texts) -> Iterator[Batch]:
        """Give the batches of texts.

        Raises:
            ValueError: there are labels and the model is no classifier of texts, a label is unknown, or the texts
                have too few tokens.
        """
        if data.labels is not None and not self.classifies:
            raise ValueError(
                f"{str(data.path)!r} has labels, and {self.class_name} does not classify texts. Leave out the column "
                f"{LABEL!r}."
            )
        return self._blocks(data) if self._is_decoder else self._rows(data)

    def _blocks(self, data: Texts) -> Iterator[Batch]:
        tokens = itertools.chain.from_iterable(map(self._tokens, data.texts))
        blocks: list[list[int]] = []
        count = 0
        while len(block := list(itertools.islice(tokens, self.length))) > 1:
            count += 1
            # The last block may be shorter. It runs alone, so that no batch needs padding.
            if blocks and len(block) < self.length:
                yield _block_batch(blocks)
                blocks = []
            blocks.append(block)
            if len(blocks) == self.batch_size:
                yield _block_batch(blocks)
                blocks = []
        if blocks:
            yield _block_batch(blocks)
        if not count:
            raise ValueError(f"{str(data.path)!r} has fewer than two tokens.")

    def _tokens(self, text: str) -> list[int]:
        """Give the tokens of a text. The end token follows, if the tokenizer has one and has not added it."""
        # `verbose=False` keeps the tokenizer from warning of a text that is longer than a block.
        tokens: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]

    def _rows(self, data: Texts) -> Iterator[Batch]:
        labels = None if data.labels is None else self._labels(data.path, data.labels)
        for start in range(0, len(data.texts), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            # Only tokenizers in Rust give the rest of a text that is too long.
            goes_on = {"return_overflowing_tokens": True} if labels is None and self._tokenizer.is_fast else {}
            tokens = self._tokenizer(data.texts[chosen], truncation=True, max_length=self.length, **goes_on)
            rows = [
                {name: tokens[name][row] for name in self._tokenizer.model_input_names if name in tokens}
                for row in range(len(tokens["input_ids"]))
            ]
            of_rows = None if labels is None else labels[chosen]
            for first in range(0, len(rows), self._rows_together):
                together = slice(first, first + self._rows_together)
                yield self._row_batch(rows[together], None if of_rows is None else of_rows[together])

    def _row_batch(self, rows: Sequence[Mapping[str, Any]], labels: Tensor | None) -> Batch:
        if len(rows) == 1:
            padded = {name: torch.tensor([values]) for name, values in rows[0].items()}
        else:
            padded = dict(self._tokenizer.pad(rows, return_tensors="pt"))
        batch: Batch = {name: tensor for name, tensor in padded.items() if name in self._arguments}
        mask = padded.get("attention_mask", torch.ones_like(padded["input_ids"]))
        if labels is not None:
            batch["labels"] = labels
        elif self._is_seq2seq:
            batch["labels"] = batch["input_ids"].masked_fill(mask == 0, IGNORED)
        elif self.config.is_encoder_decoder and not self.classifies and "decoder_input_ids" in self._arguments:
            batch["decoder_input_ids"] = batch["input_ids"]
        # The decoder's inputs are the labels, shifted by one, or the inputs themselves: all have the same padding.
        if self.config.is_encoder_decoder and not self.classifies and "decoder_attention_mask" in self._arguments:
            batch["decoder_attention_mask"] = mask
        return batch

    def _labels(self, path: Path, labels: list[Any]) -> Tensor:
        """Give labels as a tensor: numbers for a regression; otherwise ids of classes, which may be given by name."""
        if self.config.problem_type == "multi_label_classification":
            raise ValueError(
                f"{self.class_name} gives a text several labels at once, which {str(path)!r} cannot hold. Calibrate "
                "in Python, with `calibrate` and batches of your own."
            )
        if self.is_regression:
            try:
                return torch.tensor([float(label) for label in labels])
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{str(path)!r} has a label that is no number, as the model wants: {error}."
                ) from error
        ids = cast(dict[str, int], self.config.label2id or {})
        classes = cast(int, self.config.num_labels)
        found = []
        for label in labels:
            # A number in JSON is an id. A text, as all values in CSV are, may be a class's name made of digits.
            number = ids.get(label) if isinstance(label, str) else label
            if number is None and label.strip().isdecimal():
                number = int(label)
            if type(number) is not int or not 0 <= number < classes:
                known = ", ".join(map(repr, ids)) or "none by name"
                raise ValueError(
                    f"{str(path)!r} has the label {label!r}; the model knows {known}, and numbers from 0 to "
                    f"{classes - 1}."
                )
            found.append(number)
        return torch.tensor(found)


def _block_batch(blocks: list[list[int]]) -> Batch:
    tokens = torch.tensor(blocks)
    return {"input_ids": tokens, "labels": tokens.clone()}
