"""The comparison of attentions runs end to end at a tiny size; nothing here looks at how long or how well."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.examples.test_examples import EXAMPLES, example, run

SCRIPT = EXAMPLES / "compare_attention.py"

D, HEADS, CLASSES, LENGTH, MIXTURES = 100, 16, 20, 32, 16
ENCODER, LAYERS = 384, 6


def lama(d: int) -> int:
    return 2 * d * HEADS + d + d * d + d


def pooling_parameters(d: int, rank: int) -> list[int]:
    """LAMA, additive, structured, full attention, low-rank attention, Linformer."""
    full = 4 * (d * d + d)
    return [lama(d), d * d + 2 * d, d * d + HEADS * d, full, 8 * d * rank + 4 * d, full + 2 * LENGTH * MIXTURES]


def head_parameters(vectors: int, d: int) -> int:
    return vectors * d * 512 + 512 + 512 * CLASSES + CLASSES


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("quick")
    return run(SCRIPT, "--quick", "--output", "new/folder", directory=folder), folder / "new" / "folder"


@pytest.fixture(scope="module")
def result(quick: tuple[subprocess.CompletedProcess[str], Path]) -> dict:
    assert quick[0].returncode == 0, quick[0].stderr
    return json.loads((quick[1] / "compare_attention.json").read_text())


@pytest.mark.slow
class TestQuickRun:
    def test_parameters_of_attention_equal_the_formulas(self, result: dict) -> None:
        rank_adapter = LAYERS * 4 * 8 * (ENCODER + ENCODER)  # WaRA r=4 has as many as LoRA r=8
        factorized = LAYERS * 4 * (96 * 2 * ENCODER + ENCODER)  # 96: half of the break-even
        assert [row["attention_parameters"] for row in result["rows"]] == [
            *pooling_parameters(D, rank=12),  # a quarter of the break-even 50
            *pooling_parameters(ENCODER, rank=48),
            rank_adapter,
            rank_adapter,
            factorized,
        ]

    def test_all_other_parameters_are_the_same_frame(self, result: dict) -> None:
        rows = {(row["setting"], row["model"]): row for row in result["rows"]}
        frozen, tuned = "MiniLM, frozen", "MiniLM, attention trained"
        assert rows[frozen, "LAMA"]["trained_parameters"] == lama(ENCODER) + head_parameters(HEADS, ENCODER)
        additive = ENCODER * ENCODER + 2 * ENCODER + head_parameters(1, ENCODER)
        assert rows[frozen, "additive"]["trained_parameters"] == additive
        for name in ("LoRA r=8", "WaRA r=4", "factorised, SVD"):
            row = rows[tuned, name]
            assert row["trained_parameters"] == row["attention_parameters"] + additive
        encoder = rows[frozen, "additive"]["total_parameters"] - additive
        assert rows[tuned, "LoRA r=8"]["total_parameters"] == encoder + rows[tuned, "LoRA r=8"]["trained_parameters"]
        saved = LAYERS * 4 * (ENCODER * ENCODER - 96 * 2 * ENCODER)
        assert rows[tuned, "factorised, SVD"]["total_parameters"] == encoder - saved + additive

    def test_accuracies_are_summarised_by_students_interval(self, result: dict) -> None:
        for row in result["rows"]:
            first, second = row["accuracies"]
            assert 0 <= first <= 1 and 0 <= second <= 1
            assert row["accuracy_mean"] == pytest.approx((first + second) / 2)
            # Student's t at 97.5% with one degree of freedom is 12.706.
            assert row["accuracy_interval"] == pytest.approx(12.706 * abs(first - second) / 2, rel=1e-4, abs=1e-9)

    def test_step_times_are_ratios_to_full_attention(self, result: dict) -> None:
        assert [entry["length"] for entry in result["step_times"]] == [64, 128]
        for entry in result["step_times"]:
            assert set(entry["ratio"]) == {"full", "low-rank", "Linformer"}
            assert entry["ratio"]["full"] == 1
            # One round: its ratio is that of its times.
            assert entry["ratio"]["Linformer"] == pytest.approx(
                entry["seconds"]["Linformer"] / entry["seconds"]["full"]
            )

    def test_prints_a_table_and_draws(
        self, quick: tuple[subprocess.CompletedProcess[str], Path], result: dict
    ) -> None:
        process, folder = quick
        for row in result["rows"]:
            (line,) = [
                line
                for line in process.stdout.splitlines()
                if f"│ {row['setting']} " in line and f"│ {row['model']} " in line
            ]
            assert f" {row['accuracy_mean']:.3f} ± {row['accuracy_interval']:.3f} " in line
            assert f" {row['attention_parameters']:,} " in line
        for name in ("accuracy.png", "step_time.png", "attention.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")


class TestParts:
    def test_batches_are_cut_to_their_longest_text(self) -> None:
        texts_module = example("attention_texts")
        texts = tuple(texts_module.LabelledText("", label) for label in (2, 0, 1))
        split = texts_module.as_split([[5, 6], [7, 8, 9, 4], [3]], texts)
        assert split.tokens == 7
        batches = list(split.batches(2, torch.tensor([2, 0, 1])))
        assert batches[0][0].tolist() == [[3, 0], [5, 6]]
        assert batches[0][1].tolist() == [[False, True], [False, False]]
        assert batches[0][2].tolist() == [1, 2]
        assert batches[1][0].tolist() == [[7, 8, 9, 4]]

    def test_vocabulary_is_of_training_texts_alone(self) -> None:
        texts_module = example("attention_texts")
        data = {
            "train": (texts_module.LabelledText("a b, A c", 0), texts_module.LabelledText("b d", 1)),
            "test": (texts_module.LabelledText("d e B", 0),),
        }
        splits, vocab_size = texts_module.word_splits(data, 32)
        assert vocab_size == 4  # padding, other words, a, b
        assert splits["train"].inputs.tolist() == [[2, 3, 1, 2, 1], [3, 1, 0, 0, 0]]
        assert splits["test"].inputs.tolist() == [[1, 1, 3]]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--seeds", "1"], "--seeds 1 must be at least 2"),
            (["--epochs", "0"], "--epochs 0 must be at least 1"),
            (["--max-length", "8"], "--max-length 8 must be at least 16"),
            (["--max-length", "513"], "--max-length 513 must be at most 512"),
            (["--max-per-class", "3"], "max_per_class=3: use at least 15"),
            (["--output", "{file}"], "--output {file} cannot be used as a folder"),
        ],
    )
    def test_bad_input_is_told_before_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
    ) -> None:
        compare = example("compare_attention")
        monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("training started"))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        places = {"file": tmp_path / "file"}
        monkeypatch.setattr("sys.argv", ["compare_attention.py", *(a.format(**places) for a in arguments)])
        with pytest.raises(SystemExit) as stopped:
            compare.main()
        assert message.format(**places) in stopped.value.code
        assert "\n" not in stopped.value.code
