"""The example with TRL: WaRA and a reparametrised LoRA on completions only."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from trl import SFTTrainer

from tests.examples import tiny_chat_model
from tests.examples.test_examples import example

sft, chat_pairs, message_data = example("sft"), example("chat_pairs"), example("message_data")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model.save(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_trains_and_saves(model, tmp_path, monkeypatch, capsys, lora):
    """In one process, so that the trainer's batches can be looked at."""
    trainers = []
    train = SFTTrainer.train
    monkeypatch.setattr(SFTTrainer, "train", lambda self: (trainers.append(self), train(self)))
    monkeypatch.setattr(
        "sys.argv",
        ["sft.py", "--model", str(model), "--steps", "3", "--output-dir", str(tmp_path), *(["--lora"] * lora)],
    )
    sft.main()

    # Two blocks of four (32, 32) and three (32, 64), with as many parameters as LoRA r=8.
    printed = capsys.readouterr().out
    assert f"trainable params: {8 * 2 * (4 * (32 + 32) + 3 * (32 + 64)):,} " in printed
    after, before = map(float, re.search(r"messages: (\S+) nats a token, before (\S+)", printed).groups())
    assert after < before

    (trainer,) = trainers
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = trainer.processing_class
    rows = chat_pairs.encode(tokenizer, message_data.load_messages("de").train, "German")
    expected = {tuple(row["input_ids"]): row["labels"] for row in rows}
    for tokens, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert labels[:length].tolist() == expected[tuple(tokens[:length].tolist())]
        assert set(labels[length:].tolist()) <= {-100}

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == ("LORA" if lora else "WARA")
    loaded = PeftModel.from_pretrained(tiny_chat_model.model(), str(tmp_path / "adapter"))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_bad_input_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sft.py", "--language", "klingon"])
    with pytest.raises(SystemExit) as stopped:
        sft.main()
    assert "sft.py: error: Django has no messages in 'klingon'; it has af, " in stopped.value.code
