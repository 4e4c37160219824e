"""Pairs of messages as chats with a language model: tokens to learn from, loss per token, and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from jinja2 import TemplateError
from message_data import Pair
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

IGNORED = -100
"""The label of tokens that the loss leaves out."""


class Row(TypedDict):
    """Tokens of one chat; labels are the tokens of the answer, and `IGNORED` elsewhere."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int]


def chat(message: str, language: str) -> list[dict[str, str]]:
    """Return the chat that asks for a translation."""
    return [
        {"role": "system", "content": f"Translate interface messages into {language}."},
        {"role": "user", "content": message},
    ]


def prompt_and_answer(tokenizer: PreTrainedTokenizerBase, pair: Pair, language: str) -> tuple[str, str]:
    """Return the text that the model gets, and the one that it should go on with, to the end of its turn.

    Raises:
        ValueError: the tokenizer has no chat template, or one that takes no such chat, or one that writes an answer in
            another way than it asks for it.
    """
    if tokenizer.chat_template is None:
        raise ValueError("its tokenizer has no chat template; name a model that was trained to follow instructions")
    question = chat(pair.source, language)
    answered = [*question, {"role": "assistant", "content": pair.target}]
    try:
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False).rstrip()
    except TemplateError as error:
        raise ValueError(f"its chat template refuses a system message and a question: {error}") from error
    if not whole.startswith(prompt):
        raise ValueError("its chat template writes an answer in another way than it asks for it")
    return prompt, whole.removeprefix(prompt)


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], language: str) -> list[Row]:
    """Return a row for each pair; the prompt is tokenized by itself, as it is where the model has to answer."""
    rows: list[Row] = []
    for pair in pairs:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in prompt_and_answer(tokenizer, pair, language)
        )
        tokens = prompt + answer
        rows.append(
            {
                "input_ids": tokens,
                "attention_mask": [1] * len(tokens),
                "labels": [IGNORED] * len(prompt) + answer,
            }
        )
    return rows


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Return what pads rows to a batch on the right, labels with `IGNORED`."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


@torch.no_grad()
def loss_per_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], size: int = 12) -> float:
    """Return the mean cross entropy of all tokens of the answers, in nats."""
    model.eval()
    total, count = 0.0, 0
    # Rows of about one length share a batch, so that few tokens are padding.
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), size):
        logits, labels = answer_logits(model, batch_of(tokenizer, ordered[start : start + size]))
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return total / count


def batch_of(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> dict[str, Tensor]:
    return dict(collator(tokenizer)([dict(row) for row in rows]))


def answer_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits (tokens, vocabulary) that the model gives for all tokens of answers, and these tokens."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    labels = batch["labels"].to(device)[:, 1:]  # each position predicts the next
    logits = model(**inputs).logits[:, :-1]
    return logits[labels != IGNORED], labels[labels != IGNORED]


@torch.no_grad()
def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, messages: Sequence[str], language: str, size: int = 12
) -> list[str]:
    """Return what the model answers to each message, taking the likeliest token each time."""
    model.eval()
    prompts = [prompt_and_answer(tokenizer, Pair(message, ""), language)[0] for message in messages]
    texts = [""] * len(prompts)
    # Prompts of about one length share a batch, and end together, so that each answer begins at the same token.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        inputs = tokenizer(
            [prompts[index] for index in part],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        found = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(part, found, strict=True):
            texts[index] = " ".join(text.split())
    return texts
