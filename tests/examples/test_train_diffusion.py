"""The diffusion example: its data and judge, training that goes on after an interruption, sampling, and the script."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

import wara_peft  # noqa: F401  # loading its adapters takes it
from tests.examples.test_examples import EXAMPLES, ROOT, example, run

diffusers = pytest.importorskip("diffusers")
SCRIPT = EXAMPLES / "train_diffusion.py"
RESULTS = ROOT / "benchmarks" / "results"


def small_dit(**fields):
    torch.manual_seed(0)
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "in_channels": 1}
    settings |= {"out_channels": 1, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}
    return diffusers.DiTTransformer2DModel(**(settings | fields))


class TestDigits:
    def test_halves_share_no_image_and_have_all_of_them(self) -> None:
        pool, test = example("diffusion_digits").load_halves()
        assert len(pool.labels) + len(test.labels) == 1797
        assert (pool.labels.bincount() - test.labels.bincount()).abs().max() <= 10
        assert not pool.pixels.flatten(1).unsqueeze(1).eq(test.pixels.flatten(1)).all(-1).any()

    def test_as_many_images_of_each_digit(self) -> None:
        digits = example("diffusion_digits")
        pool = digits.load_halves()[0].of(digits.NEW)
        first, other = pool.draw(20, 1), pool.draw(20, 2)
        assert first.labels.bincount().tolist()[7:] == [7, 7, 6]
        assert not torch.equal(first.pixels, other.pixels)

    def test_frechet_distance_is_scipys(self) -> None:
        first = torch.randn(60, 5, dtype=torch.float64)
        second = torch.randn(80, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 1
        a, b = np.cov(first.numpy().T), np.cov(second.numpy().T)
        means = ((first.mean(0) - second.mean(0)) ** 2).sum().item()
        expected = means + np.trace(a + b - 2 * sqrtm(a @ b).real)
        frechet_distance = example("diffusion_digits").frechet_distance
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)
        assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)


class TestTraining:
    @pytest.mark.parametrize("method", ["LoRA", "subband", "grid"])
    def test_an_interrupted_training_ends_with_the_same_weights(self, tmp_path: Path, method: str) -> None:
        training, study = example("diffusion_training"), example("diffusion_study")
        images, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 3 + 7
        scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
        settings = training.Training(6, 4, 1e-2, seed=3, checkpoint_steps=2, validation_steps=5)
        base = small_dit()

        def adapted():
            return study.adapted(base, method, 4, range(7, 10), seed=1)

        whole, first, second = adapted(), adapted(), adapted()
        training.train(whole, scheduler, images, labels, settings, tmp_path / "whole")

        def interrupt(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.train(first, scheduler, images, labels, settings, tmp_path / "cut", interrupt)
        assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-4"]
        training.train(second, scheduler, images, labels, settings, tmp_path / "cut")
        fresh = dict(adapted().named_parameters())
        for name, value in second.named_parameters():
            assert torch.equal(value, whole.get_parameter(name)), name
            if value.requires_grad and "wara_A" not in name and "lora_A" not in name:
                assert not torch.equal(value, fresh[name]), name

    def test_as_many_parameters(self) -> None:
        study = example("diffusion_study")
        counts = {m: study.adapter_parameters(study.adapted(small_dit(), m, 4, [7], 0)) for m in study.METHODS}
        expected = 4 * (4 * (16 + 16) + 2 * (16 + 64))
        assert counts == {"embeddings": 0, "LoRA": expected, "subband": expected, "grid": expected}

    @pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
    def test_sampling_by_a_model_that_knows_gives_the_image(self, prediction_type: str) -> None:
        """The target of the training, predicted without error, leads DDIM to the image that it was made from."""
        training = example("diffusion_training")
        scheduler = diffusers.DDPMScheduler(beta_schedule="linear", prediction_type=prediction_type)
        image = torch.rand(1, 1, 8, 8) * 1.6 - 0.8

        class Oracle(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(1))

            def forward(self, noisy, timestep, class_labels):
                signal = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
                noise = (noisy - signal.sqrt() * image) / (1 - signal).sqrt()
                known = training.target(scheduler, image.expand_as(noisy), noise, timestep)
                variance = torch.full_like(known, torch.nan)  # as DiT predicts, and what is to be left out
                return type("Output", (), {"sample": torch.cat([known, variance], 1)})

        config = small_dit().config
        found = training.sample(Oracle(), scheduler, torch.tensor([7, 8, 9]), 0, config)
        torch.testing.assert_close(found, image.expand(3, -1, -1, -1), atol=1e-3, rtol=0)


def test_rates_are_those_that_other_seeds_chose() -> None:
    study, report = example("diffusion_study"), example("diffusion_report")
    found: dict[str, dict[float, list[float]]] = {}
    for run_ in map(json.loads, (RESULTS / "diffusion.jsonl").read_text().splitlines()):
        if run_["seed"] in report.TUNING_SEEDS:
            found.setdefault(run_["method"], {}).setdefault(run_["rate"], []).append(run_["validation"])
        else:
            assert run_["seed"] in report.SEEDS and run_["rate"] == study.METHODS[run_["method"]][1]
    assert all(tuple(sorted(rates)) == study.RATES for rates in found.values())
    assert all(len(runs) == len(report.TUNING_SEEDS) for rates in found.values() for runs in rates.values())
    chosen = {name: min(rates, key=lambda rate: sum(rates[rate])) for name, rates in found.items()}
    assert chosen == {name: rate for name, (_, rate) in study.METHODS.items()}
    assert not set(report.TUNING_SEEDS) & set(report.SEEDS)


class TestScript:
    @pytest.mark.slow
    def test_quick_run_and_no_cell_twice(self, tmp_path: Path) -> None:
        result = run(SCRIPT, "--quick", directory=tmp_path)
        assert result.returncode == 0, result.stderr
        folder = tmp_path / "train_diffusion_output" / "quick"
        lines = (folder / "diffusion.jsonl").read_text().splitlines()
        found = {(line["method"], line["seed"]): line for line in map(json.loads, lines)}
        assert len(found) == len(lines) == 8
        differences = [found["grid", seed]["test"] - found["LoRA", seed]["test"] for seed in (0, 1)]
        assert f"| {np.mean(differences):+.2f} ± " in result.stdout
        assert (folder / "diffusion_samples.png").read_bytes().startswith(b"\x89PNG")
        again = run(SCRIPT, "--quick", directory=tmp_path)
        assert again.returncode == 0, again.stderr
        assert "Pretrained" not in again.stdout
        assert (folder / "diffusion.jsonl").read_text().splitlines() == lines
        assert again.stdout.splitlines()[:8] == result.stdout.splitlines()[-9:-1]

    @pytest.mark.slow
    def test_base_and_images_of_ones_own(self, tmp_path: Path) -> None:
        from peft import PeftModel
        from PIL import Image

        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
        )
        base = small_dit(in_channels=4, out_channels=8)
        diffusers.DiTPipeline(base, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "base")
        for name in ("cats", "dogs"):
            (tmp_path / "images" / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (20, 12), (80 * number, 0, 0)).save(tmp_path / "images" / name / f"{number}.png")
        arguments = ["--base", "base", "--images", "images", "--method", "grid", "--steps", "4"]
        result = run(SCRIPT, *arguments, "--checkpoint-steps", "2", "--output-dir", "out", directory=tmp_path)
        assert result.returncode == 0, result.stderr
        folder = tmp_path / "out" / "grid-4-0.003-4"
        assert {path.name for path in folder.iterdir()} == {"adapter", "step-2.png", "step-4.png"}
        with torch.no_grad():
            inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([9])}
            inputs["class_labels"] = torch.tensor([1])
            before = base.eval()(**inputs).sample
            after = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()(**inputs).sample
        assert not torch.equal(before, after)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rank", "6"], "--rank 6 must be a multiple of 4"),
            (["--count", "2"], "--count 2 must be at least 3"),
            (["--base", "missing"], "--base and --images go together"),
            (["--base", "{folder}", "--images", "{folder}"], "{folder}"),
        ],
    )
    def test_bad_input_is_told_before_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
    ) -> None:
        script = example("train_diffusion")
        monkeypatch.setattr(script, "train", lambda *_: pytest.fail("training started"))
        monkeypatch.chdir(tmp_path)
        filled = [argument.format(folder=tmp_path) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["train_diffusion.py", *filled])
        with pytest.raises(SystemExit) as stopped:
            script.main()
        assert message.format(folder=tmp_path) in stopped.value.code
        assert "\n" not in stopped.value.code
