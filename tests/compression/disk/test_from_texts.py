"""`wara-peft compress`, `inspect` and `merge` of compressed models, from directories to directories."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner, Result

from tests.compression.models import bert, llama
from wara_peft import WaRAConfig
from wara_peft.compression import (
    Fisher,
    LowRankLinear,
    calibrate,
    compress,
    load_compressed,
    save_compressed,
    truncate,
)
from wara_peft.compression.disk.text_batches import TextBatches
from wara_peft.compression.disk.text_files import read_texts
from wara_peft.compression.methods import METHODS
from wara_peft.compression.report import Evaluation
from wara_peft.compression.statistics.layer_statistics import MANIFEST
from wara_peft_cli.app import app

QUIET = {"show_progress_bar": False}
WORDS = [f"w{index}" for index in range(36)]


def say(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="wara-peft", env={"COLUMNS": "160"})


def with_tokenizer(model: nn.Module, path: Path) -> None:
    model.save_pretrained(path, max_shard_size="5KB")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in several shards with a tokenizer, and texts."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("made")
    with_tokenizer(llama(), path / "base")
    assert len(list((path / "base").glob("*.safetensors"))) > 2
    lines = [" ".join(WORDS[int(i)] for i in torch.randint(36, (int(n),))) for n in torch.randint(3, 12, (40,))]
    (path / "texts.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("solver", ["svd", "fisher", "activation", "activation-fisher", "dictionary-oneshot"])
def test_as_by_hand(made: Path, tmp_path: Path, solver: str) -> None:
    result = say(
        "compress",
        made / "base",
        tmp_path / "out",
        "--budget",
        "0.7",
        "--solver",
        solver,
        "--texts",
        made / "texts.txt",
    )
    assert result.exit_code == 0, result.output
    assert "import wara_peft" in result.output
    model = LlamaForCausalLM.from_pretrained(made / "base")
    texts = read_texts(made / "texts.txt")
    assert len(texts.texts) == 40
    data = list(TextBatches(made / "base", model.config, LlamaForCausalLM, 8, 512)(texts))
    assert data[0]["input_ids"].shape == (8, 32)
    kinds = ["inputs", *(["gradients"] if "-fisher" in solver else []), *(["fisher"] if solver == "fisher" else [])]
    statistics = calibrate(model, data, kinds, show_progress_bar=False)
    expected = compress(model, METHODS[solver](0.7), statistics, show_progress_bar=False)
    loaded = load_compressed(tmp_path / "out")
    assert loaded.compression_report == expected
    with torch.no_grad():
        torch.testing.assert_close(loaded(**data[0]).logits, model(**data[0]).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w4")["input_ids"] == [7, 8]


@pytest.mark.parametrize("sequential", [False, True])
def test_by_block(made: Path, tmp_path: Path, sequential: bool) -> None:
    options = ("--budget", "0.6", "--texts", made / "texts.txt", *(["--sequential"] if sequential else []))
    whole = say("compress", made / "base", tmp_path / "whole", *options)
    found = say("compress", made / "base", tmp_path / "found", *options, "--by-block")
    assert (whole.exit_code, found.exit_code) == (0, 0), whole.output + found.output
    report, expected = (load_compressed(tmp_path / name).compression_report for name in ("found", "whole"))
    assert report == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "found")("w3 w4")["input_ids"] == [7, 8]
    for option in ("evaluate", "statistics"):
        refused = say(
            "compress", made / "base", tmp_path / "out", *options, "--by-block", f"--{option}", tmp_path / "x"
        )
        assert refused.exit_code == 1 and f"leave out {option}" in refused.output


def test_two_runs_with_one_calibration_and_inspect(made: Path, tmp_path: Path) -> None:
    options = ("--budget", "3500", "--statistics", tmp_path / "statistics")
    first = say("compress", made / "base", tmp_path / "a", "--texts", made / "texts.txt", "--memory", 21_000, *options)
    assert first.exit_code == 0, first.output
    assert len(list((tmp_path / "statistics").glob("*.safetensors"))) > 1
    again = say("compress", made / "base", tmp_path / "b", *options)
    assert again.exit_code == 0, again.output
    report = load_compressed(tmp_path / "a").compression_report
    assert report == load_compressed(tmp_path / "b").compression_report and report.budget == 3500
    shown = say("inspect", tmp_path / "a")
    assert shown.exit_code == 0 and report.summary.split(":")[0] in shown.output.replace("\n", " ")
    assert all(layer.name in shown.output and f"{layer.lost:.2%}" in shown.output for layer in report.layers)
    fields = json.loads(say("inspect", tmp_path / "a", "--json").output)
    assert fields["report"]["spent"] == report.spent
    assert fields["layers"].keys() == {layer.name for layer in report.layers if layer.rank is not None}
    assert ", now" not in shown.output
    model = load_compressed(tmp_path / "a")
    truncate(model, 1)
    save_compressed(model, tmp_path / "cut")
    cut = say("inspect", tmp_path / "cut").output
    assert cut.count(", now 1") == sum((layer.rank or 0) > 1 for layer in report.layers) > 0
    (tmp_path / "a" / "compression.json").unlink()  # as in a checkpoint of Trainer
    assert "up_proj: kind:LowRankLinear rank:" in say("inspect", tmp_path / "a").output


def test_bytes_targets_allocation_and_sequential(made: Path, tmp_path: Path) -> None:
    result = say(
        *(
            "compress",
            made / "base",
            tmp_path / "out",
            "--budget",
            "4KB",
            "--texts",
            made / "texts.txt",
            "--sequential",
        ),
        *("--allocation", "uniform", "--target", "up_proj", "--target", "down_proj", "--batches", 3),
    )
    assert result.exit_code == 0, result.output
    report = load_compressed(tmp_path / "out").compression_report
    assert report.sequential and report.unit == "bytes" and report.spent <= report.budget == 4000
    assert {layer.name.split(".")[-1] for layer in report.layers} == {"up_proj", "down_proj"}


def test_merging_an_adapter_into_a_compressed_base(made: Path, tmp_path: Path) -> None:
    say("compress", made / "base", tmp_path / "base", "--budget", "0.7", "--texts", made / "texts.txt")
    base = load_compressed(tmp_path / "base")
    targets = [f"{name}.up" for name, layer in base.named_modules() if isinstance(layer, LowRankLinear)]
    adapted = get_peft_model(base, WaRAConfig(r=1, target_modules=[*targets, "lm_head"], init_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    result = say("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert result.exit_code == 0 and "load_compressed" in result.output, result.output
    tokens = torch.arange(3, 9).view(1, 6)
    expected = PeftModel.from_pretrained(load_compressed(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        found = load_compressed(tmp_path / "merged")(tokens).logits
        torch.testing.assert_close(found, expected(tokens).logits, rtol=0, atol=1e-5)


class TestClassifier:
    """A fine-tuned classifier with labelled texts: what FWSVD was made for."""

    @pytest.fixture
    def labelled(self, tmp_path: Path) -> tuple[Path, list[list[int]], list[int]]:
        torch.manual_seed(0)
        with_tokenizer(bert(), tmp_path / "bert")
        rows = [torch.randint(36, (int(n),)).tolist() for n in torch.randint(2, 12, (30,))]
        labels = torch.randint(3, (30,)).tolist()
        texts = [" ".join(WORDS[word] for word in row) for row in rows]
        lines = [f"{text},LABEL_{label}" for text, label in zip(texts, labels, strict=True)]
        (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]))
        lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
        (tmp_path / "test.jsonl").write_text("\n".join(lines[:20]))
        return tmp_path, [[word + 4 for word in row] for row in rows], labels

    def test_by_fisher_in_one_command(self, labelled: tuple[Path, list[list[int]], list[int]]) -> None:
        path, rows, labels = labelled
        result = say(
            *("compress", path / "bert", path / "out", "--budget", "0.5", "--solver", "fisher", "--batch-size", 1),
            *("--texts", path / "train.csv", "--evaluate", path / "test.jsonl"),
        )
        assert result.exit_code == 0, result.output
        model = BertForSequenceClassification.from_pretrained(path / "bert")
        data = [
            {"input_ids": torch.tensor([row]), "labels": torch.tensor([label])}
            for row, label in zip(rows, labels, strict=True)
        ]

        def share(of: nn.Module) -> float:
            with torch.no_grad():
                return sum(int(of(**one).logits.argmax() == one["labels"]) for one in data[:20]) / 20

        before = share(model)
        expected = compress(model, Fisher(0.5), calibrate(model, data, ["fisher", "inputs"], **QUIET), **QUIET)
        loaded = load_compressed(path / "out")
        with torch.no_grad():
            torch.testing.assert_close(loaded(**data[0]).logits, model(**data[0]).logits, rtol=0, atol=1e-5)
        report = loaded.compression_report
        assert {layer.name: layer.rank for layer in report.layers} == {
            layer.name: layer.rank for layer in expected.layers
        }
        assert report.evaluation == Evaluation("accuracy", before, share(model))
        assert f"accuracy: {before:.2%} before, {share(model):.2%} after." in result.output.replace("\n", " ")
        assert "accuracy:" in say("inspect", path / "out").output
        assert "classifier" not in {layer.name for layer in report.layers}

    def test_evaluates_only_what_can_be_counted(self, labelled: tuple[Path, list[list[int]], list[int]]) -> None:
        path, _, _ = labelled
        config = json.loads((path / "bert" / "config.json").read_text())
        (path / "bert" / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
        options = ("--budget", "0.5", "--solver", "svd", "--evaluate", path / "test.jsonl")
        assert "BertForSequenceClassification estimates a number" in say(
            "compress", path / "bert", path / "out", *options
        ).stderr.replace("\n", " ")


def test_evaluates_perplexity(made: Path, tmp_path: Path) -> None:
    """Batches of other sizes give the same value, up to rounding, as every predicted token counts the same."""
    found = []
    for size in (1, 5):
        options = ("--budget", "0.4", "--solver", "svd", "--evaluate", made / "texts.txt", "--batch-size", size)
        result = say("compress", made / "base", tmp_path / str(size), *options)
        assert result.exit_code == 0 and "perplexity:" in result.output, result.output
        found.append(load_compressed(tmp_path / str(size)).compression_report.evaluation)
    for one, other in itertools.pairwise(found):
        assert one.metric == "perplexity" and one.before != one.after
        assert (one.before, one.after) == (pytest.approx(other.before, rel=1e-5), pytest.approx(other.after, rel=1e-5))
    # The weights are random and small, so all 40 words are nearly equally likely.
    assert found[0].before == pytest.approx(40, rel=0.1)


def must_not_be_called(*_: object, **__: object) -> None:
    raise AssertionError("The weights are loaded.")


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--budget", "0.6"], "solver='activation' needs texts"),
            (["--budget", "0.6", "--solver", "svd", "--sequential"], "sequential needs texts"),
            (["--budget", "1.6", "--solver", "svd"], "budget=1.6 must be a share"),
            (["--budget", "some", "--solver", "svd"], "budget='some' must be a share such as"),
            (["--budget", "9", "--solver", "svd"], "budget of 9 parameters is less than"),
            (["--budget", "0.6", "--solver", "svd", "--target", "nothing"], "'nothing' matches no"),
            (["--budget", "0.6", "--texts", "TEXTS/missing.txt"], "There is no file"),
            (["--budget", "0.6", "--texts", "TEXTS/empty.txt"], "has no texts"),
            (["--budget", "0.6", "--texts", "TEXTS/binary.txt"], "is not text in UTF-8"),
            (["--budget", "0.6", "--texts", "TEXTS/labelled.csv"], "LlamaForCausalLM does not classify texts"),
            (["--budget", "0.6", "--solver", "svd", "--evaluate", "TEXTS/missing.txt"], "There is no file"),
            (["--budget", "0.6", "--solver", "svd", "--evaluate", "TEXTS/labelled.csv"], "does not classify texts"),
            (["--budget", "0.6", "--solver", "svd", "--length", "1", "--evaluate", "TEXTS/texts.txt"], "at least 2"),
            (["--budget", "1KB", "--solver", "svd"], "budget of 1,000 bytes is less than"),
            (["--budget", "48MB", "--solver", "svd", "--allocation", "cost"], "cannot be one where flops are"),
            (["--budget", "1", "--solver", "svd", "--allocation", "cost", "--cost", "bytes"], "budget of 1 bytes is"),
            (
                ["--budget", "0.6", "--solver", "svd", "--allocation", "depth", "--target", "lm_head"],
                "needs layers in numbered blocks, and 'lm_head' is in none",
            ),
            (["--budget", "0.6", "--solver", "svd", "--statistics", "TEXTS/broken"], "has no layers"),
        ],
    )
    def test_is_one_line_before_weights_are_loaded_and_leaves_nothing(
        self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
    ) -> None:
        (tmp_path / "empty.txt").write_text("\n \n")
        (tmp_path / "texts.txt").write_text("w1 w2\n")
        (tmp_path / "labelled.csv").write_text("text,label\nw1,0\n")
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / MANIFEST).write_text("{}")
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", must_not_be_called)
        (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
        options = [option.replace("TEXTS", str(tmp_path)) for option in options]
        result = say("compress", made / "base", tmp_path / "out", *options)
        assert result.exit_code == 1
        lines = [line for line in result.stderr.splitlines() if line.startswith("wara-peft: ")]
        assert len(lines) == 1 and message in lines[0], result.stderr
        assert not (tmp_path / "out").exists()

    def test_no_tokenizer_no_loss_and_what_is_compressed_already(self, made: Path, tmp_path: Path) -> None:
        options = ("--budget", "0.6", "--texts", made / "texts.txt")
        llama().save_pretrained(tmp_path / "bare")
        assert "has no tokenizer" in say("compress", tmp_path / "bare", tmp_path / "out", *options).stderr
        with_tokenizer(bert(), tmp_path / "bert")
        found = say("compress", tmp_path / "bert", tmp_path / "out", *options, "--solver", "fisher")
        assert "solver='fisher' needs labels" in found.stderr
        assert say("compress", tmp_path / "bert", tmp_path / "out", *options).exit_code == 0
        again = say("compress", tmp_path / "out", tmp_path / "again", *options)
        assert "factorised layers already" in again.stderr
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        assert "exists already" in say("compress", tmp_path / "bert", tmp_path / "out", *options).stderr
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        plot = say("inspect", tmp_path / "out", "--plot", tmp_path / "x.png")
        assert plot.exit_code == 1 and "no subbands to plot" in plot.stderr


def test_an_option_of_another_solver(made: Path, tmp_path: Path) -> None:
    options = ("--budget", "0.5", "--solver", "svd", "--damping", "0.1")
    result = say("compress", made / "base", tmp_path / "out", *options)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "--damping" in result.stderr and "'svd' has no such option; 'activation-fisher' has." in result.stderr
