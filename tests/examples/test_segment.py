"""The comparison on scenes: what is drawn, what is judged and what trains; then a whole run at a tiny size."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from transformers import EvalPrediction, TrainerCallback

from tests.examples.test_examples import EXAMPLES, ROOT, example, run

SCRIPT = EXAMPLES / "segment.py"
RESULTS = ROOT / "benchmarks" / "results"
SIZES = 2 * (32 + 32) * 2 + (32 + 64) * 2 + 2 * (64 + 64) * 2 + (64 + 128) * 2 + 2 * (4 * (96 + 96) + 2 * (96 + 192))
"""Sum of in + out features: four attention projections and two of the MLP in blocks of width 32, 64, 96 and 96."""


@pytest.fixture(scope="module")
def segment():
    return example("segment")


@pytest.fixture(scope="module")
def scenes():
    return example("segment_scenes")


class TestScenes:
    def test_a_pixel_has_a_label_where_there_is_enough_ink(self, scenes):
        """On a black canvas without noise the pixels are the ink."""
        black = scenes.Style(lambda count, _: torch.zeros(count, scenes.SIZE, scenes.SIZE), (10, 20), 0.0)
        drawn = scenes.Scenes(black, "train", 20, seed=0)
        ink = (drawn.pixels.squeeze(1) + 1) / 2
        assert torch.equal(drawn.labels > 0, ink > 0.3)
        assert set(drawn.labels.unique().tolist()) == set(range(11))

    def test_labels_are_those_of_the_digits(self, scenes):
        """A digit that fills the canvas: its label, and its ink scaled up."""
        style = scenes.Style(lambda count, _: torch.zeros(count, 48, 48), (48, 48), 0.0)
        drawn = scenes.Scenes(style, "validation", 5, seed=1)
        ink, names = scenes.digits()
        for pixels, labels in zip(drawn.pixels, drawn.labels, strict=True):
            small = torch.nn.functional.interpolate((pixels[None] + 1) / 2, size=(8, 8), mode="area")[0, 0]
            nearest = (ink[1000:1300] - small).square().sum((1, 2)).argmin()
            assert labels.unique().tolist() == [0, int(names[1000 + nearest]) + 1]

    def test_splits_share_no_digit(self, scenes):
        parts = list(scenes.PARTS.values())
        together = [index for part in parts for index in part]
        assert sorted(together) == list(range(len(scenes.digits()[1])))

    def test_seeds_decide_all(self, scenes):
        first, same, other = (scenes.Scenes(scenes.TARGET, "test", 3, seed) for seed in (0, 0, 1))
        assert torch.equal(first.pixels, same.pixels) and torch.equal(first.labels, same.labels)
        assert not torch.equal(first.labels, other.labels)
        validation = scenes.Scenes(scenes.TARGET, "validation", 3, 0)
        assert not torch.equal(first.labels > 0, validation.labels > 0)
        assert first[0]["pixel_values"].shape == (1, 48, 48) and first[0]["labels"].shape == (48, 48)

    def test_textures_are_where_their_docstrings_say(self, scenes):
        generator = torch.Generator().manual_seed(0)
        for texture, top in ((scenes.clouds, 0.5), (scenes.stripes, 0.7)):
            drawn = texture(50, generator)
            assert drawn.shape == (50, 48, 48)
            assert drawn.min() >= 0 and top - 0.05 < drawn.max() <= top


class TestMeanIou:
    def test_is_the_mean_of_jaccard_scores_of_the_classes_that_occur(self, segment):
        rng = np.random.default_rng(0)
        true, found = rng.integers(0, 9, (2, 5, 6, 6))  # two of the eleven classes do not occur
        expected = jaccard_score(true.ravel(), found.ravel(), average="macro")
        assert segment.mean_iou(EvalPrediction(found, true))["mean_iou"] == pytest.approx(expected)

    def test_masks_are_those_of_the_enlarged_logits(self, segment):
        logits = torch.full((1, 3, 2, 2), -9.0)
        logits[0, 1, 0] = logits[0, 2, 1] = 9.0
        masks = segment.masks_of(logits, torch.zeros(1, 6, 6))
        assert masks[0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]


class TestMethods:
    @pytest.fixture
    def trained(self, segment):
        """Trained parameters of a method, by whether they are the decoder's."""

        def count(name: str) -> tuple[int, int]:
            base = segment.AutoModelForSemanticSegmentation.from_config(segment.small_segformer())
            model = segment.to_train(base, name)
            every = sum(p.numel() for p in model.parameters() if p.requires_grad)
            own = segment.adapter_parameters(model)
            return own, every - own

        return count

    def test_adapters_have_equally_many_parameters_beside_the_same_decoder(self, trained):
        decoder = 64 * (32 + 64 + 96) + 3 * 64 + 3 * 64 * 64 + 2 * 64 + 11 * 64 + 11
        for name in ("LoRA", "WaRA subband", "WaRA grid"):
            assert trained(name) == (8 * SIZES, decoder)
        assert trained("decoder alone") == (0, decoder)
        assert trained("before") == (0, 0)
        own, rest = trained("full fine-tuning")
        assert rest == decoder and own > 8 * SIZES


class TestPretraining:
    @pytest.mark.slow
    def test_is_kept_whole_or_not_at_all(self, segment, tmp_path, monkeypatch):
        trained = []
        untouched = segment.trainer_of

        class Interrupt(TrainerCallback):
            def on_train_end(self, *args, **kwargs):
                raise KeyboardInterrupt

        def observed(*arguments, **settings):
            trained.append(untouched(*arguments, **settings))
            if len(trained) == 1:
                trained[0].add_callback(Interrupt())
            return trained[-1]

        folder = tmp_path / "pretrained"
        monkeypatch.setattr(segment, "trainer_of", observed)
        with pytest.raises(KeyboardInterrupt):
            segment.pretrained(folder, segment.QUICK)
        assert not folder.exists()
        for _ in range(2):
            assert segment.pretrained(folder, segment.QUICK) == folder
        assert len(trained) == 2
        loaded = segment.AutoModelForSemanticSegmentation.from_pretrained(folder).state_dict()
        expected = trained[1].model.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def test_rates_are_those_that_validation_of_other_seeds_chose(segment):
    found: dict[str, dict[float, list[float]]] = {}
    for line in (RESULTS / "segmentation.jsonl").read_text().splitlines():
        run = json.loads(line)
        if run["seed"] in segment.TUNING_SEEDS:
            found.setdefault(run["method"], {}).setdefault(run["rate"], []).append(run["validation"])
    assert all(len(runs) == len(segment.TUNING_SEEDS) for rates in found.values() for runs in rates.values())
    chosen = {name: max(rates, key=lambda rate: sum(rates[rate])) for name, rates in found.items()}
    assert chosen == {name: method.rate for name, method in segment.METHODS.items()}
    assert not set(segment.TUNING_SEEDS) & set(segment.SEEDS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("segment")
    result = run(SCRIPT, "--quick", directory=folder)
    assert result.returncode == 0, result.stderr
    return result, folder / "segment_output" / "quick"


@pytest.mark.slow
class TestQuickRun:
    def lines(self, folder: Path) -> list[dict]:
        return [json.loads(line) for line in (folder / "segmentation.jsonl").read_text().splitlines()]

    def test_table_of_all_methods(self, segment, quick):
        result, folder = quick
        lines = self.lines(folder)
        assert {(line["method"], line["seed"]) for line in lines} == {
            (name, seed) for name in segment.METHODS for seed in (0, 1)
        }
        for name in segment.METHODS:
            first, second = (100 * line["test"] for line in lines if line["method"] == name)
            base = [100 * line["test"] for line in lines if line["method"] == "LoRA"]
            (row,) = [line for line in result.stdout.splitlines() if line.startswith(f"| {name} |")]
            cells = [cell.strip() for cell in row.split("|")[1:-1]]
            # Student's t at 97.5 % with one degree of freedom is 12.706.
            assert cells[3] == f"{(first + second) / 2:.1f} ± {12.7062 * abs(first - second) / 2:.1f}"
            if name != "LoRA":
                one, two = first - base[0], second - base[1]
                assert cells[4] == f"{(one + two) / 2:+.1f} ± {12.7062 * abs(one - two) / 2:.1f}"

    def test_finished_runs_are_not_run_again(self, quick, tmp_path):
        folder = tmp_path / "segment_output" / "quick"
        shutil.copytree(quick[1], folder)
        kept = (folder / "segmentation.jsonl").read_text().splitlines(keepends=True)
        (folder / "segmentation.jsonl").write_text("".join(kept[:-1]))
        again = run(SCRIPT, "--quick", directory=tmp_path)
        assert again.returncode == 0, again.stderr
        assert "Pretrained model found" in again.stdout
        lines, before = self.lines(folder), [json.loads(line) for line in kept]
        assert lines[:-1] == before[:-1]
        # The seed decides all of a run.
        ignored = {"seconds"}
        assert {k: v for k, v in lines[-1].items() if k not in ignored} == {
            k: v for k, v in before[-1].items() if k not in ignored
        }

    def test_picture_of_masks(self, quick):
        assert (quick[1] / "segment_masks.png").read_bytes().startswith(b"\x89PNG")
        assert re.search(r"Pretrained: mean IoU 0\.\d+ on", quick[0].stdout)


def test_bad_input_is_told_before_training(tmp_path, monkeypatch, segment):
    monkeypatch.setattr(segment, "pretrained", lambda *_: pytest.fail("training started"))
    file = tmp_path / "file"
    file.touch()
    for option in ("--output-dir", "--results"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["segment.py", option, str(file)])
        with pytest.raises(SystemExit) as stopped:
            segment.main()
        assert stopped.value.code.startswith(f"segment.py: error: {option} {file} cannot be used as a folder")
