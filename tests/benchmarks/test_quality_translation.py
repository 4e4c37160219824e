"""The task of translating, with a tiny model in place of the real one: its batches, its loss, and its plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.examples import tiny_chat_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from quality import plan
from quality.tasks import translation
from quality.tasks.translation import BATCH_SIZE, STEPS, Translation

TASK = Translation("de")


@pytest.fixture
def problem(monkeypatch):
    tokenizer, model = tiny_chat_model.tokenizer(), tiny_chat_model.model()
    tokenizer.pad_token = tokenizer.eos_token
    monkeypatch.setattr(translation, "tokenizer", lambda: tokenizer)
    monkeypatch.setattr(translation, "pretrained", lambda: model)
    return TASK.problem(0)


def test_batches_waste_few_tokens_and_depend_on_the_seed_alone(problem) -> None:
    batches = list(problem.batches())
    assert len(batches) == STEPS
    assert all(len(batch["input_ids"]) <= BATCH_SIZE and batch["attention_mask"][:, -1].any() for batch in batches)
    used = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert used > 0.85 * sum(batch["attention_mask"].numel() for batch in batches)
    again, other = list(TASK.problem(0).batches()), list(TASK.problem(1).batches())
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert any(a["input_ids"].shape != b["input_ids"].shape for a, b in zip(batches, other, strict=True))


def test_an_epoch_has_each_chat_once(problem) -> None:
    number = len(problem.splits["train"]["labels"])
    problem.steps = -(-number // BATCH_SIZE)
    rows = [
        tuple(row[mask.bool()].tolist())
        for b in problem.batches()
        for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert len(rows) == len(set(rows)) == number


def test_loss_is_a_mean_over_tokens(problem) -> None:
    """Not over chats or batches: each chat by itself gives its own sum."""
    rows = {name: tensor[:9] for name, tensor in problem.splits["test"].items()}
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(9):
            length = int(rows["attention_mask"][index].sum())
            one = {name: tensor[index : index + 1, :length] for name, tensor in rows.items()}
            tokens = int((one["labels"][:, 1:] != -100).sum())
            total += float(problem.model(**one).loss) * tokens
            count += tokens
    assert problem.score(problem.model, rows) == pytest.approx(total / count, rel=1e-5)


def test_rates_are_chosen_on_one_seed_and_three_others_are_reported() -> None:
    cells = plan.pending(plan.stage(7, {}), {})
    assert {cell.seed for cell in cells} == {100} and {cell.rate for cell in cells} == {1e-3, 3e-3, 1e-2}
    results = {
        cell: {"validation": abs(cell.rate - 3e-3), "test": 0.0, "parameters": 1, "seconds": 1.0} for cell in cells
    }
    found = plan.pending(plan.stage(7, results), results)
    assert {cell.seed for cell in found} == {0, 1, 2} and {cell.rate for cell in found} == {3e-3}
    assert len(found) == 3 * len(plan.stage(7, {}))
