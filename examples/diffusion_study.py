"""The comparison on the digits: methods, and runs that are kept as lines of JSON."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusion_digits import NEW, OLD, SIZE, Digits, load_halves, load_judge
from diffusion_report import SEEDS, draw_samples  # it finds the benchmarks, of which the store of runs is
from diffusion_training import Training, load_base, remove_checkpoints, sample, save_grid, train
from harness import environment
from matplotlib.figure import Figure
from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model
from quality.cells import Cell, Store
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from wara_peft import WaRAConfig

PRETRAINING = Training(steps=3000, batch_size=64, learning_rate=2e-3)
ADAPTATION_STEPS, BATCH_SIZE = 400, 16
SAMPLES = 510
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
TABLE = "embedding_table"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


# 1. Methods


def lora(rank: int, side: int, **common: Any) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=rank, **common)


def subband(rank: int, side: int, **common: Any) -> PeftConfig:
    return WaRAConfig(r=rank // 2, **common)


def grid(rank: int, side: int, **common: Any) -> PeftConfig:
    return WaRAConfig(form="grid", r=rank // 4, grid_size=(side, side), num_prefix_tokens=0, **common)


def embeddings(rank: int, side: int, **common: Any) -> PeftConfig:
    """The classes' embeddings and nothing else."""
    return TrainableTokensConfig(target_modules=[TABLE], token_indices=common["trainable_token_indices"][TABLE])


METHODS: dict[str, tuple[Callable[..., PeftConfig], float]] = {
    "embeddings": (embeddings, 1e-1),
    "LoRA": (lora, 1e-2),
    "subband": (subband, 1e-2),
    "grid": (grid, 3e-3),
}
"""A config from LoRA's rank and the rows of patches, and a learning rate; `--tune` tries others."""


def adapted(base: DiTTransformer2DModel, method: str, rank: int, classes: Sequence[int], seed: int) -> PeftModel:
    """A copy of the base with an adapter, and with embeddings of these classes that train."""
    torch.manual_seed(seed)
    side = base.config.sample_size // base.config.patch_size
    config = METHODS[method][0](rank, side, target_modules=LAYERS, trainable_token_indices={TABLE: list(classes)})
    return get_peft_model(copy.deepcopy(base), config)


def adapter_parameters(model: PeftModel) -> int:
    """Trained numbers without those of the classes' embeddings."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and TABLE not in name)


# 2. Runs


def pretrained(halves: tuple[Digits, Digits], folder: Path, training: Training) -> Path:
    """Folder of the small DiT that knows the digits 0 to 6, trained if it is not there."""
    if (folder / "scheduler").exists():
        print(f"Pretrained model found in {folder}")
        return folder
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=4,
        in_channels=1,
        out_channels=1,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    known = [half.of(OLD) for half in halves]
    labels = torch.tensor(OLD).repeat_interleave(8)

    def validate(model: DiTTransformer2DModel, step: int) -> None:
        save_grid(sample(model, noise_scheduler, labels, 0, model.config), 8, folder / f"step-{step}.png")

    pixels, digits = (torch.cat([getattr(half, name) for half in known]) for name in ("pixels", "labels"))
    seconds = train(model, noise_scheduler, pixels, digits, training, folder, validate)
    print(f"Pretrained on the digits 0 to 6 in {seconds:.0f} s")
    model.save_pretrained(folder / "transformer")
    noise_scheduler.save_pretrained(folder / "scheduler")  # last: it says that the rest is there
    remove_checkpoints(folder)
    return folder


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        count: images that the new digits are learned from.
        rank: LoRA's; the other methods have its parameters.
        seeds: which images, first values, order and noise.
        rates: learning rates; None takes the one of each method.
        folder: of the pretrained model, the judge, checkpoints and samples.
        results: folder of the JSON lines.
    """

    count: int
    rank: int
    seeds: range
    rates: tuple[float, ...] | None
    folder: Path
    results: Path
    pretraining: Training = PRETRAINING
    steps: int = ADAPTATION_STEPS
    samples: int = SAMPLES

    def cell(self, method: str, rate: float, seed: int) -> Cell:
        return Cell(f"diffusion/{self.count} images", method, self.rank, rate, seed)

    def cells(self) -> list[Cell]:
        """Seeds outside, so that no method has the machine's quiet hour to itself."""
        return [
            self.cell(method, rate, seed)
            for seed in self.seeds
            for method, (_, own) in METHODS.items()
            for rate in self.rates or (own,)
        ]

    def run(self) -> dict[Cell, dict[str, Any]]:
        """Run the cells that are not in the results yet, and return the results of all."""
        store = Store(self.results, self.folder / "locks")
        cells = self.cells()
        left = [cell for cell in cells if cell not in store.results()]
        if left:
            judged = Judged(self)
            for cell in tqdm(left, unit="run"):
                with store.claim(cell) as mine:
                    if mine:
                        store.append(cell, judged.run(cell))
        return {cell: result for cell, result in store.results().items() if cell in cells}

    def samples_path(self, method: str) -> Path:
        return self.folder / f"samples-{method}-{self.count}-{self.rank}.safetensors"


class Judged:
    """Runs cells from one base and before one judge."""

    def __init__(self, study: Study) -> None:
        self.study = study
        halves = load_halves()
        self.pool, self.test = (half.of(NEW) for half in halves)
        self.judge = load_judge(halves[0], study.folder / "judge.safetensors")
        print(f"The judge's accuracy on images that it has not seen: {self.judge.accuracy(halves[1]):.3f}")
        base = pretrained(halves, study.folder / "pretrained", study.pretraining)
        self.base, self.noise_scheduler, _ = load_base(str(base))

    def run(self, cell: Cell) -> dict[str, Any]:
        """Adapt, sample and judge; `validation` and `test` are distances to the pool and to the other half."""
        study = self.study
        drawn = self.pool.draw(study.count, cell.seed)
        model = adapted(self.base, cell.method, study.rank, NEW, cell.seed)
        folder = study.folder / "runs" / f"{cell.method}-{study.count}-{study.rank}-{cell.rate}-{cell.seed}"
        training = Training(study.steps, BATCH_SIZE, cell.rate, cell.seed)
        seconds = train(model, self.noise_scheduler, drawn.pixels, drawn.labels, training, folder)
        labels = torch.tensor(NEW).repeat_interleave(study.samples // len(NEW))
        found = Digits(sample(model, self.noise_scheduler, labels, cell.seed, self.base.config), labels)
        if cell.seed == SEEDS[0]:
            save_file({"pixels": found.pixels}, study.samples_path(cell.method))
        shutil.rmtree(folder)  # its checkpoints
        return {
            "validation": self.judge.distance(found, self.pool),
            "test": self.judge.distance(found, self.test),
            "accuracy": self.judge.accuracy(found),
            "test_of_learned_images": self.judge.distance(drawn, self.test),
            "test_of_real_images": self.judge.distance(self.pool, self.test),
            "parameters": adapter_parameters(model),
            "seconds": round(seconds, 3),
            **environment(),
        }


# 3. A picture


def draw(study: Study) -> Figure:
    """The first seed's images, and beneath them samples of each method from the same noise."""
    drawn = load_halves()[0].of(NEW).draw(study.count, SEEDS[0])
    rows = {"learned from": [drawn.pixels[drawn.labels == digit] for digit in NEW]}
    for method in METHODS:
        if study.samples_path(method).exists():
            rows[method] = list(load_file(study.samples_path(method))["pixels"].chunk(len(NEW)))
    return draw_samples(rows, [str(digit) for digit in NEW])
