"""The tasks of the quality suite: the same for all methods at a seed, with splits apart."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import ndimage
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from quality import plan
from quality.tasks import TASKS
from quality.tasks.conv import blurred, edges, halves, lit
from quality.tasks.digits import Digits, images, seen_as
from quality.tasks.docstrings import CLASSES, of_each_class
from quality.tasks.language import LENGTH, VOCABULARY, new_llama, perplexity, sequences
from quality.tasks.planted import CHANGES, Planted, weight_rows


class TestTasks:
    @pytest.mark.slow
    @pytest.mark.parametrize("task", [Digits(8, "inverted", 8, 3, pretraining_epochs=1), Planted("block-local", 3)])
    def test_methods_share_base_head_data_and_order_at_a_seed(self, task: Digits | Planted) -> None:
        first, second, other = task.problem(1), task.problem(1), task.problem(2)
        for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        inputs = "pixel_values" if isinstance(task, Digits) else "inputs"
        batches = list(zip(first.batches(), second.batches(), other.batches(), strict=True))
        assert len(batches) == 3
        for a, b, c in batches:
            assert torch.equal(a[inputs], b[inputs]) and not torch.equal(a[inputs], c[inputs])

    def test_splits_of_digits_are_apart_and_balanced(self) -> None:
        splits = Digits(8, "clean", 8, 3, pretraining_epochs=1).problem(0).splits
        assert {name: len(rows["labels"]) for name, rows in splits.items()} == {
            "train": 40,
            "validation": 200,
            "test": 300,
        }
        assert splits["train"]["labels"].bincount().tolist() == [8] * 5
        everything = images(5, 9)[0].flatten(1)
        places = [
            {int((everything == image.flatten()).all(1).nonzero()[0]) for image in rows["pixel_values"]}
            for rows in splits.values()
        ]
        assert not (places[0] & places[1] or places[0] & places[2] or places[1] & places[2])

    def test_domains(self) -> None:
        pixels = images(5, 9)[0][:50]
        generator = torch.Generator().manual_seed(0)
        noise = seen_as("inverted", pixels, generator) + pixels
        assert noise.std().item() == pytest.approx(0.4, abs=0.01)
        moved = seen_as("shifted", pixels, generator)
        assert not torch.equal(moved, pixels)
        inner = moved[:, :, 1:-1, 1:-1]
        parts = [
            pixels[:, 0, 1 + down : 15 + down, 1 + right : 15 + right] for down in (-1, 0, 1) for right in (-1, 0, 1)
        ]
        found = torch.stack([(inner[:, 0] == part).all((1, 2)) for part in parts])
        assert found.any(0).all() and found.any(1).all()  # each image is one of the nine, and each of the nine occurs

    @pytest.mark.parametrize("kind", CHANGES)
    def test_planted_changes_have_mean_square_one(self, kind: str) -> None:
        inputs, outputs = weight_rows(CHANGES[kind](), 20_000)
        assert outputs.square().mean().item() == pytest.approx(1, rel=0.05)
        assert inputs.square().mean().item() == pytest.approx(1, rel=0.01)

    def test_structure_of_planted_changes(self) -> None:
        assert torch.linalg.matrix_rank(CHANGES["low-rank"]()) == 8
        local = CHANGES["block-local"]()
        assert torch.equal(local * torch.block_diag(*[torch.ones(8, 8)] * 8), local)
        # Scales of 1, 2, 4, 8 and 16 channels: the means over blocks of 16 hold most of the coarsest.
        multi = CHANGES["multi-scale"]()
        coarse = nn.functional.avg_pool2d(multi[None], 16)[0]
        assert 16 * coarse.norm() > 0.8

    def test_error_is_zero_at_the_planted_change_and_one_before(self) -> None:
        problem = Planted("spatial filter", 2).problem(0)
        rows = problem.splits["test"]
        assert problem.score(problem.model, rows) == pytest.approx(1, abs=0.1)
        problem = Planted("random", 2).problem(0)
        rows = problem.splits["train"]
        solution = torch.linalg.lstsq(rows["inputs"], rows["labels"]).solution.T
        problem.model.layer.weight.data = solution
        assert problem.score(problem.model, problem.splits["test"]) < 0.01

    def test_every_task_has_seeds_and_names_are_apart(self) -> None:
        assert {task.name.partition("/")[0] for task in TASKS.values()} <= plan.SEEDS.keys()
        assert all(name == task.name for name, task in TASKS.items())

    def test_statistics_of_the_convolutions_images(self) -> None:
        pixels = images(0, 4)[0][:20]
        generator = torch.Generator().manual_seed(0)
        noise = blurred(pixels, generator)[:, 0].numpy()
        for index, image in enumerate(pixels[:, 0].numpy()):
            noise[index] -= ndimage.uniform_filter(image, 5, mode="constant", cval=-1.0)
        assert noise.std() == pytest.approx(0.3, rel=0.05) and abs(noise.mean()) < 0.02
        assert torch.allclose(edges(pixels, generator)[..., 1:], 2 * pixels.diff(dim=3))
        assert lit(pixels, generator)[3, 0, 5, 0].item() == pytest.approx(-0.5 * pixels[3, 0, 5, 0].item() - 0.7 + 0.3)
        (first, first_labels), (second, second_labels) = halves()
        assert len(first) + len(second) == 1797
        assert set(first_labels.tolist()) == set(second_labels.tolist()) == set(range(10))

    def test_texts_of_each_class_differ_by_seed(self) -> None:
        labels = torch.arange(CLASSES).repeat(30)
        rows = of_each_class(labels, 8, seed=1)
        assert labels[rows].bincount().tolist() == [8] * CLASSES
        assert len(set(rows.tolist())) == 8 * CLASSES
        assert torch.equal(rows, of_each_class(labels, 8, seed=1))
        assert not torch.equal(rows, of_each_class(labels, 8, seed=2))

    def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(self) -> None:
        model = new_llama()
        nn.init.zeros_(model.lm_head.weight)
        tokens = torch.randint(VOCABULARY, (30, LENGTH))
        assert perplexity(model, {"input_ids": tokens, "labels": tokens}) == pytest.approx(VOCABULARY, rel=1e-4)

    def test_sequences_hold_the_texts_one_after_the_other(self) -> None:
        class Letters:
            def encode(self, text: str) -> SimpleNamespace:
                return SimpleNamespace(ids=[ord(letter) for letter in text])

        texts = ["a" * 60, "b" * 60, "c" * 60]
        tokens = sequences(Letters(), texts, torch.Generator().manual_seed(0))
        assert tokens.shape == (183 // LENGTH, LENGTH)
        text = "".join(map(chr, tokens.flatten().tolist()))
        order = [part for part in text.split("\n") if part]
        assert order[0] in texts and order[1] in texts and order[0] != order[1]
