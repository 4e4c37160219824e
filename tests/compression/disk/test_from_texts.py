"""`wara-peft compress`, `inspect` and `merge` of compressed models, from directories to directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from tests.compression.models import bert, llama
from wara_peft import WaRAConfig
from wara_peft.compression import LowRankLinear, calibrate, compress, load_compressed, save_compressed, truncate
from wara_peft.compression.disk.from_texts import read_texts, text_batches
from wara_peft_cli.app import app

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
    assert "load_compressed" in result.output
    model = LlamaForCausalLM.from_pretrained(made / "base")
    texts = read_texts(made / "texts.txt")
    assert len(texts) == 40
    data = list(text_batches(made / "base", model.config, "LlamaForCausalLM", texts, 8, 512))
    assert len(data) == 5 and bool((data[0]["labels"] == -100).any())
    kinds = ["inputs", *(["gradients"] if "-fisher" in solver else []), *(["fisher"] if solver == "fisher" else [])]
    statistics = calibrate(model, data, kinds, show_progress_bar=False)
    expected = compress(model, 0.7, solver, statistics, show_progress_bar=False)
    loaded = load_compressed(tmp_path / "out")
    assert loaded.compression_report == expected
    with torch.no_grad():
        torch.testing.assert_close(loaded(**data[0]).logits, model(**data[0]).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w4")["input_ids"] == [7, 8]


def test_two_runs_with_one_calibration_and_inspect(made: Path, tmp_path: Path) -> None:
    options = ("--budget", "3500", "--statistics", tmp_path / "statistics")
    first = say("compress", made / "base", tmp_path / "a", "--texts", made / "texts.txt", "--memory", 20_000, *options)
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
        ],
    )
    def test_is_one_line_and_leaves_nothing(
        self, made: Path, tmp_path: Path, options: list[str], message: str
    ) -> None:
        (tmp_path / "empty.txt").write_text("\n \n")
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
        assert "returns no loss" in found.stderr
        assert say("compress", tmp_path / "bert", tmp_path / "out", *options).exit_code == 0
        again = say("compress", tmp_path / "out", tmp_path / "again", *options)
        assert "factorised layers already" in again.stderr
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        assert "exists already" in say("compress", tmp_path / "bert", tmp_path / "out", *options).stderr
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        plot = say("inspect", tmp_path / "out", "--plot", tmp_path / "x.png")
        assert plot.exit_code == 1 and "no subbands to plot" in plot.stderr
