"""Batches of texts: packed for decoders, whole for classifiers; and what is measured with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Model,
)

from tests.compression.models import bert, llama
from tests.families.models import DECODER, ENCODER
from wara_peft.compression.disk.evaluation import accuracy, perplexity
from wara_peft.compression.disk.text_batches import TextBatches
from wara_peft.compression.disk.text_files import Texts

WORDS = [f"w{index}" for index in range(36)]
PAD, BEGIN, END = 0, 1, 2
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def tokenizer(path: Path, begin: bool = False, end: bool = False, **options: Any) -> None:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    if begin or end:
        form = f"{'<s> ' * begin}$A{' </s>' * end}"
        made.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[(name, number) for name, number in (("<s>", 1), ("</s>", 2)) if name in form]
        )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(path)


def batches_for(model: PreTrainedModel, path: Path, batch_size: int = 4, length: int = 6) -> TextBatches:
    return TextBatches(path, model.config, type(model), batch_size, length)


def texts(*counts: int, labels: list | None = None) -> Texts:
    """Texts with these numbers of words, which go on through the vocabulary."""
    numbers = itertools.cycle(range(36))
    return Texts(Path("file"), [" ".join(f"w{next(numbers)}" for _ in range(count)) for count in counts], labels)


def ids(found: Texts) -> Iterator[list[int]]:
    return ([4 + int(word[1:]) for word in text.split()] for text in found.texts)


class TestBlocks:
    @pytest.mark.parametrize("begin", [False, True])
    @pytest.mark.parametrize("end", [False, True])
    @pytest.mark.parametrize("counts", [(3, 50, 1, 7), (11,), (5, 5, 5, 5), (29,)])
    def test_no_token_is_lost_or_padded(self, tmp_path: Path, begin: bool, end: bool, counts: tuple) -> None:
        tokenizer(tmp_path, begin, end, pad_token=None)
        given = texts(*counts)
        found = list(batches_for(llama(), tmp_path)(given))
        stream = [token for text in ids(given) for token in [*[BEGIN] * begin, *text, END]]
        stream = stream[: len(stream) - (len(stream) % 6 == 1)]  # one token predicts nothing
        assert torch.cat([batch["input_ids"].flatten() for batch in found]).tolist() == stream
        assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in found)
        shapes = [tuple(batch["input_ids"].shape) for batch in found]
        full, rest = divmod(len(stream), 6)
        sizes = [4] * (full // 4) + [full % 4] * (full % 4 > 0)
        assert shapes == [(size, 6) for size in sizes] + [(1, rest)] * (rest > 0)

    def test_limits_of_model_and_tokenizer(self, tmp_path: Path) -> None:
        tokenizer(tmp_path)
        assert batches_for(llama(), tmp_path, length=512).length == 32
        tokenizer(tmp_path, model_max_length=10)
        assert batches_for(llama(), tmp_path, length=512).length == 10
        with pytest.raises(ValueError, match="length=1 must be at least 2"):
            batches_for(llama(), tmp_path, length=1)
        tokenizer(tmp_path, eos_token=None)
        with pytest.raises(ValueError, match="fewer than two tokens"):
            list(batches_for(llama(), tmp_path)(texts(1)))

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="has no tokenizer"):
            batches_for(llama(), tmp_path)


class TestRows:
    def test_a_long_text_goes_on_in_the_next_row(self, tmp_path: Path) -> None:
        tokenizer(tmp_path, begin=True, end=True)
        given = texts(3, 11, 4)
        found = list(batches_for(BertModel(bert().config), tmp_path)(given))
        rows = [[token for token in row if token > END] for batch in found for row in batch["input_ids"].tolist()]
        assert sorted(itertools.chain(*rows)) == sorted(itertools.chain(*ids(given)))
        assert [len(row) for row in rows] == [3, 4, 4, 3, 4]
        for batch in found:
            assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD).long())
            assert bool((batch["input_ids"][:, 0] == BEGIN).all()) and "labels" not in batch

    def test_a_text_with_a_label_is_one_row(self, tmp_path: Path) -> None:
        tokenizer(tmp_path)
        found = list(batches_for(bert(), tmp_path, 2)(texts(3, 11, 4, labels=[2, 0, 1])))
        assert [batch["input_ids"].shape for batch in found] == [(2, 6), (1, 4)]
        assert torch.cat([batch["labels"] for batch in found]).tolist() == [2, 0, 1]

    def test_a_classifier_without_padding_gets_single_rows(self, tmp_path: Path) -> None:
        tokenizer(tmp_path)
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **DECODER, num_labels=3, pad_token_id=None)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        given = texts(3, 5, 4, labels=[2, 0, 1])
        found = list(batches_for(model, tmp_path)(given))
        assert [len(batch["input_ids"]) for batch in found] == [1, 1, 1]
        expected = [int(model(torch.tensor([row])).logits.argmax()) for row in ids(given)]
        right = sum(left == label for left, label in zip(expected, [2, 0, 1], strict=True))
        assert accuracy(model, found) == right / 3

    def test_only_arguments_of_the_model(self, tmp_path: Path) -> None:
        tokenizer(tmp_path)
        fields = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("distilbert", **fields)).eval()
        (batch,) = batches_for(model, tmp_path)(texts(3, 4, labels=[0, 1]))
        assert batch.keys() == {"input_ids", "attention_mask", "labels"} and model(**batch).loss.isfinite()

    @pytest.mark.parametrize("make", [AutoModelForSeq2SeqLM.from_config, T5Model])
    def test_encoder_and_decoder(self, tmp_path: Path, make: Any) -> None:
        tokenizer(tmp_path, end=True)
        torch.manual_seed(0)
        model = make(AutoConfig.for_model("t5", **T5, decoder_start_token_id=0)).eval()
        (batch,) = batches_for(model, tmp_path)(texts(3, 4))
        mask = batch["input_ids"] != PAD
        assert torch.equal(batch["decoder_attention_mask"].bool(), mask)
        if make is T5Model:
            assert torch.equal(batch["decoder_input_ids"], batch["input_ids"])
        else:
            assert torch.equal(batch["labels"], batch["input_ids"].where(mask, -100))
        model(**batch)


class TestLabels:
    def labels(self, path: Path, given: list, **fields: Any) -> Tensor:
        tokenizer(path)
        model = bert()
        model.config.update(fields)
        (batch,) = batches_for(model, path, len(given))(texts(*[2] * len(given), labels=given))
        return batch["labels"]

    def test_names_and_numbers(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, [2, "1", "LABEL_0"]).tolist() == [2, 1, 0]
        stars = {"label2id": {"1": 0, "2": 1, "3": 2}, "id2label": {0: "1", 1: "2", 2: "3"}}
        assert self.labels(tmp_path, ["1", "3", "2", 2], **stars).tolist() == [0, 2, 1, 2]

    @pytest.mark.parametrize("label", [3, -1, "3", "-1", "good", "", 1.0, True, [1]])
    def test_unknown(self, tmp_path: Path, label: Any) -> None:
        with pytest.raises(ValueError, match=r"'file' has the label .* knows 'LABEL_0', .* numbers from 0 to 2"):
            self.labels(tmp_path, [0, label])

    def test_numbers_to_estimate(self, tmp_path: Path) -> None:
        found = self.labels(tmp_path, ["0.5", 2], problem_type="regression")
        assert found.dtype == torch.float32 and found.tolist() == [0.5, 2]
        with pytest.raises(ValueError, match="no number"):
            self.labels(tmp_path, ["good"], problem_type="regression")

    def test_several_labels_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="several labels at once"):
            self.labels(tmp_path, [0], problem_type="multi_label_classification")

    def test_models_without_labels(self, tmp_path: Path) -> None:
        tokenizer(tmp_path)
        for model in (llama(), BertModel(bert().config)):
            with pytest.raises(ValueError, match=f"has labels, and {type(model).__name__} does not classify texts"):
                batches_for(model, tmp_path)(texts(3, labels=[0]))

    def test_loss(self, tmp_path: Path) -> None:
        tokenizer(tmp_path)
        batches_for(llama(), tmp_path).check_loss(texts(3), "it")
        batches_for(bert(), tmp_path).check_loss(texts(3, labels=[0]), "it")
        with pytest.raises(
            ValueError, match=r"it needs labels, as BertForSequenceClassification .* 'text' and 'label'"
        ):
            batches_for(bert(), tmp_path).check_loss(texts(3), "it")
        masked = BertForMaskedLM(AutoConfig.for_model("bert", **ENCODER))
        with pytest.raises(ValueError, match="it needs a loss, and BertForMaskedLM has none"):
            batches_for(masked, tmp_path).check_loss(texts(3), "it")


class TestMeasures:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_perplexity_of_a_decoder(self, tmp_path: Path, batch_size: int) -> None:
        tokenizer(tmp_path)
        torch.manual_seed(0)
        model = llama().double()
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
        given = texts(9, 4, 13)
        stream = torch.tensor([token for text in ids(given) for token in [*text, END]])
        losses = []
        for block in stream.split(6):
            chances = F.log_softmax(model(block[None]).logits[0], -1)
            losses += [-chances[place, block[place + 1]] for place in range(len(block) - 1)]
        expected = float(torch.stack(losses).mean().exp())
        found = perplexity(model, batches_for(model, tmp_path, batch_size)(given), is_shifted=False)
        assert found == pytest.approx(expected, rel=1e-10)

    def test_perplexity_of_a_model_with_an_encoder(self, tmp_path: Path) -> None:
        tokenizer(tmp_path, end=True)
        torch.manual_seed(0)
        config = AutoConfig.for_model("t5", **T5, decoder_start_token_id=0)
        model = AutoModelForSeq2SeqLM.from_config(config).eval().double()
        given = texts(2, 5, 4)
        total, count = 0.0, 0
        for row in ids(given):
            row = torch.tensor([[*row, END]])
            total += float(model(input_ids=row, labels=row).loss) * row.numel()
            count += row.numel()
        expected = torch.tensor(total / count).exp().item()
        found = perplexity(model, batches_for(model, tmp_path, 2)(given), is_shifted=True)
        assert found == pytest.approx(expected, rel=1e-5)

    def test_accuracy_does_not_depend_on_batches(self, tmp_path: Path) -> None:
        tokenizer(tmp_path)
        torch.manual_seed(0)
        model = bert().double().train()
        rows = list(ids(texts(*range(1, 7))))
        answers = [int(model.eval()(torch.tensor([row])).logits.argmax()) for row in rows]
        wanted = [answers[0], *[(answer + 1) % 3 for answer in answers[1:5]], answers[5]]
        model.train()
        for size in (1, 4, 6):
            made = batches_for(model, tmp_path, size)(texts(*range(1, 7), labels=wanted))
            assert accuracy(model, made) == pytest.approx(2 / 6)
        assert model.training
