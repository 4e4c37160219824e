"""The examples run as users run them, to the end; what is wrong with the input is told before they train."""

from __future__ import annotations

import csv
import importlib
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from tests.forked_python import run_python

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CLASSIFY_TEXT = EXAMPLES / "classify_text.py"
TABLE = ["--dataset", "{table}", "--text-column", "sentence", "--label-column", "topic"]


PATHS = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(EXAMPLES)))}


def run(script: Path | str, *arguments: object, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of the examples in a folder, as users do; in a fork, which saves it the imports."""
    return run_python(script, *arguments, cwd=directory, env=PATHS)


# Runs a script whose second process was forked before the script began, in place of a fresh interpreter.
FORKED_IN_ADVANCE = """
import multiprocessing, runpy, subprocess, sys

def become(words):
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")

def begin():
    become(theirs.recv())

def run(command, **options):
    if command[0] != sys.executable:
        return run_as_before(command, **options)
    assert not options
    ours.send(command[1:])
    second.join()
    return subprocess.CompletedProcess(command, second.exitcode)

ours, theirs = multiprocessing.Pipe()
second = multiprocessing.get_context("fork").Process(target=begin, daemon=True)
second.start()
run_as_before, subprocess.run = subprocess.run, run
become(sys.argv[1:])
"""


def run_with_second_process(script: Path, *arguments: object, directory: Path) -> subprocess.CompletedProcess[str]:
    """As `run`, for a script that starts itself once more: its second process begins in a fork too."""
    return run("-c", FORKED_IN_ADVANCE, script, *arguments, directory=directory)


def example(name: str) -> ModuleType:
    """Import an example as it is imported where it is run: with its own folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A whole run on a few docstrings, and the folder that it was started in."""
    folder = tmp_path_factory.mktemp("smoke")
    return run_with_second_process(CLASSIFY_TEXT, "--smoke", "--levels", "2", "--r", "2", directory=folder), folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A local data set with string labels and 40 rows, one of them without a label; there is no test split."""
    folder = tmp_path / "table"
    folder.mkdir()
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sentence", "topic"))
        writer.writerows((f"text number {i}", ("even", "odd")[i % 2]) for i in range(40))
        writer.writerow(("a text without a label", ""))
    return folder


class TestClassifyText:
    @pytest.mark.slow
    def test_runs_to_the_end(self, smoke: tuple[subprocess.CompletedProcess[str], Path]) -> None:
        result, _ = smoke
        assert result.returncode == 0, result.stderr
        assert "Second process: logits of 32 test texts are equal, bit by bit" in result.stdout
        assert re.search(r"Merged: logits are equal, the largest difference is \d\.\de-\d\d", result.stdout)

    @pytest.mark.slow
    def test_prints_both_runs(self, smoke: tuple[subprocess.CompletedProcess[str], Path]) -> None:
        # MiniLM: 6 layers of four (384, 384) and two (384, 1536); r = 2 at two levels; a head with 20 outputs.
        subbands = 3 * (1 / 2 + 1 / 4) + 1 / 4
        adapter = int(6 * 2 * subbands * (4 * (384 + 384) + 2 * (384 + 1536)))
        head = 20 * 384 + 20
        rows = [line.split() for line in smoke[0].stdout.splitlines()[-2:]]
        assert rows[0][-3:-1] == [f"{head:,}", "0"]
        assert rows[1][-3:-1] == [f"{head + adapter:,}", f"{adapter:,}"]
        assert all(0 <= float(row[-4]) <= 1 for row in rows)

    @pytest.mark.slow
    def test_writes_adapter_and_picture(self, smoke: tuple[subprocess.CompletedProcess[str], Path]) -> None:
        folder = smoke[1] / "classify_text_output"
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        prefix = "base_model.model.encoder.encoder.layer.5.output.dense."
        assert weights[f"{prefix}wara_A.level1"].shape == (6, 768)
        assert weights[f"{prefix}wara_B.level2"].shape == (96, 8)
        assert weights["base_model.model.classifier.weight"].shape == (20, 384)
        assert (folder / "subband_energy.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.slow
    def test_reload_notices_another_adapter(
        self, smoke: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
    ) -> None:
        """The comparison in the second process can fail: here a scaling is changed on disk."""
        folder = tmp_path / "changed"
        (folder / "adapter").mkdir(parents=True)
        for file in ("reload_check.pt", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
            (folder / file).write_bytes((smoke[1] / "classify_text_output" / file).read_bytes())
        config = folder / "adapter" / "adapter_config.json"
        config.write_text(config.read_text().replace('"wara_alpha": null', '"wara_alpha": 140'))
        result = run(CLASSIFY_TEXT, "--reload", "--output-dir", folder, directory=tmp_path)
        assert result.returncode == 1
        assert "logits differ by up to" in result.stderr

    @pytest.mark.slow
    def test_bad_input_ends_the_process_with_one_line(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        result = run(CLASSIFY_TEXT, "--output-dir", file, directory=tmp_path)
        assert result.returncode == 1
        assert result.stdout == ""
        assert f"classify_text.py: error: --output-dir {file} cannot be used as a folder" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--wavelet", "bior2.2"], "bior2.2"),
            (["--r", "0"], "r=0 must be an int from 1 to 65536"),
            (["--epochs", "0"], "--epochs 0 must be at least 1"),
            (["--learning-rate", "-1"], "--learning-rate -1.0 must be greater than 0"),
            (["--reload"], "run without --reload first"),
            (["--model", "{folder}", *TABLE], "--model {folder} cannot be loaded"),
            (["--dataset", "{folder}/missing"], "{folder}/missing"),
            ([*TABLE, "--text-column", "body"], "no text column 'body'; its columns are sentence, topic"),
            ([*TABLE, "--label-column", "label"], "no label column 'label'"),
        ],
    )
    def test_bad_input_is_told_before_training(
        self, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
    ) -> None:
        classify_text = example("classify_text")
        monkeypatch.setattr(classify_text, "train", lambda *_: pytest.fail("training started"))
        monkeypatch.chdir(tmp_path)
        places = {"table": table, "folder": tmp_path}
        monkeypatch.setattr("sys.argv", ["classify_text.py", *(argument.format(**places) for argument in arguments)])
        with pytest.raises(SystemExit) as stopped:
            classify_text.main()
        assert message.format(**places) in stopped.value.code
        assert "\n" not in stopped.value.code


class TestNamedData:
    def test_string_labels_and_missing_splits(self, table: Path) -> None:
        load_named_data = example("named_data").load_named_data
        splits, num_labels = load_named_data(str(table), None, "sentence", "topic", seed=0)
        assert num_labels == 2
        assert {name: len(split) for name, split in splits.items()} == {"train": 33, "validation": 4, "test": 3}
        rows = [row for split in splits.values() for row in split]
        assert sorted(rows) == sorted((f"text number {i}", i % 2) for i in range(40))


@pytest.mark.slow
def test_qwara_trains_and_merges_in_four_bits(tmp_path: Path) -> None:
    result = run(EXAMPLES / "qwara.py", "--max-per-class", "15", "--epochs", "1", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"test accuracy: 0\.\d+ with the adapter, 0\.\d+ merged into 4-bit weights", result.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def vit_digits(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vit_digits")


class TestVitDigits:
    SCRIPT = EXAMPLES / "vit_digits.py"

    @pytest.mark.slow
    def test_table_picture_and_cache(self, vit_digits: Path) -> None:
        result = run(self.SCRIPT, "--smoke", directory=vit_digits)
        assert result.returncode == 0, result.stderr
        folder = vit_digits / "vit_digits_output"
        table = (folder / "table.txt").read_text()
        assert table in result.stdout
        # Four blocks of four (64, 64) and two (64, 128).
        sizes = 4 * (4 * (64 + 64) + 2 * (64 + 128))
        expected = {"head": 0, "LoRA": 8 * sizes, "subband": 8 * sizes, "grid": 8 * sizes, "tiny": 4 * 6 * 4 * 8**2}
        for name, count in expected.items():
            line = next(line for line in table.splitlines() if name in line)
            assert line.split()[-2] == f"{count:,}"
        assert "full fine-tuning" in table
        assert (folder / "grid_responses.png").read_bytes().startswith(b"\x89PNG")

        again = run(self.SCRIPT, "--smoke", directory=vit_digits)
        assert again.returncode == 0, again.stderr
        assert "Pretrained model found" in again.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--image-size", "9"], "--image-size 9 must be even"),
            (["--epochs", "0"], "--epochs is too small"),
            (["--wavelet", "bior2.2"], "bior2.2"),
            (["--model", "missing"], "--model and --dataset go together"),
            (["--model", "missing", "--dataset", "missing"], "missing"),
        ],
    )
    def test_bad_input_is_told_before_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
    ) -> None:
        vit_digits = example("vit_digits")
        monkeypatch.setattr(vit_digits, "train", lambda *_: pytest.fail("training started"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["vit_digits.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            vit_digits.main()
        assert message in stopped.value.code
        assert "\n" not in stopped.value.code

    @pytest.mark.slow
    def test_ranks_are_allocated_on_the_same_model(self, vit_digits: Path) -> None:
        script = EXAMPLES / "allocate_ranks.py"
        result = run(script, "--smoke", "--like", "2", "--output-dir", "ranks", directory=vit_digits)
        assert result.returncode == 0, result.stderr
        budget = 2 * 4 * (4 * (64 + 64) + 2 * (64 + 128))
        assert f" of {budget:,} parameters; rank (share of the energy) by gradient" in result.stdout
        sizes = {
            line[:24].strip(): int(line.split()[-1].replace(",", ""))
            for line in result.stdout.splitlines()
            if re.match(r"(LoRA|WaRA)", line)
        }
        assert sizes["LoRA r=2"] == sizes["WaRA r=1"] == budget
        assert budget - 2 * 64 < sizes["WaRA, ranks by gradient"] <= budget
        assert (vit_digits / "ranks" / "ranks.png").read_bytes().startswith(b"\x89PNG")
        refused = run(script, "--like", "3", directory=vit_digits)
        assert refused.stderr.splitlines()[-1].startswith("allocate_ranks.py: error: --like 3 must be even")

    def test_images_of_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With `--model` and `--dataset`: here a processor and pictures in local folders."""
        from PIL import Image
        from transformers import AutoImageProcessor, ViTImageProcessor

        for label in ("cats", "dogs"):
            (tmp_path / "images" / label).mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (20, 12), (25 * number, 0, 0)).save(tmp_path / "images" / label / f"{number}.png")
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
        try:
            AutoImageProcessor.from_pretrained(tmp_path / "model")
        except ImportError:
            pytest.skip("this release of transformers prepares images by torchvision alone")
        vit_digits = example("vit_digits")
        arguments = ["--model", tmp_path / "model", "--dataset", tmp_path / "images", "--label-column", "label"]
        monkeypatch.setattr("sys.argv", ["vit_digits.py", *map(str, arguments), "--output-dir", str(tmp_path / "out")])
        images = vit_digits.named_images(vit_digits.parse_arguments())
        assert [len(labels) for _, labels in images.splits.values()] == [10, 5, 5]
        assert images.splits["train"][0].shape == (10, 3, 8, 8)
        assert images.names == ["0", "1"]
