"""Adapt a small SegFormer to scenes that look otherwise than those it learnt from, offline, by LoRA and by WaRA.

    python examples/segment.py              # one seed of all methods, from nothing: some minutes on two CPU cores
    python examples/segment.py --full       # five seeds
    python examples/segment.py --quick      # whether everything runs; the figures mean nothing

A SegFormer learns to find and name digits on canvases of dark clouds, and is kept in --output-dir. Then it is adapted
to a few scenes with stripes, noise and smaller digits, each time from the same weights: LoRA and the WaRA forms
"subband" and "grid" in all linear layers of its encoder, with equally many parameters. The decoder trains in full
beside each of them, and also alone. Judged is the mean IoU on scenes of digits that nothing was trained on.

Seeds decide which scenes, first values and order of batches; the SegFormer is the same for all of them. Learning rates
were chosen on the validation scenes of other seeds: --tune shows how. Finished runs are lines of JSON, and are not
run again. For a model and a data set of your own, replace `pretrained` and `Scenes`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, get_peft_model
from segment_scenes import NAMES, SOURCE, TARGET, Scenes
from study_options import make_folders, parse_study, study_parser
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    PrinterCallback,
    SegformerConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from wara_peft import WaRAConfig

# The statistics and the store of finished runs are those of the benchmarks.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from harness import environment
from quality.cells import Cell, Store
from segment_report import SEEDS, TUNING_SEEDS, draw_masks, table, tuning_table

RATES = (3e-3, 1e-2, 3e-2)
PRETRAINING_RATE, PRETRAINING_BATCH_SIZE, BATCH_SIZE = 3e-3, 16, 8
SHOWN = 4
"""Scenes of the picture."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of scenes and steps."""

    pretraining_scenes: int = 1500
    pretraining_steps: int = 2000
    scenes: int = 128
    steps: int = 150
    held_out: int = 200


QUICK = Sizes(pretraining_scenes=16, pretraining_steps=4, scenes=8, steps=2, held_out=8)


def parse_arguments() -> argparse.Namespace:
    parser = study_parser(__doc__, "segment_output")
    parser.add_argument("--full", action="store_true", help=f"{len(SEEDS)} seeds in place of one")
    args = parse_study(parser)
    make_folders(args)
    return args


# 1. The methods


@dataclass(frozen=True)
class Method:
    """The config of an adapter of the size of LoRA r=8, or None for a method without an adapter; the learning rate."""

    config: Callable[..., PeftConfig] | None
    rate: float


METHODS = {
    "before": Method(None, 0.0),
    "decoder alone": Method(None, 1e-2),
    "full fine-tuning": Method(None, 3e-3),
    "LoRA": Method(lambda **common: LoraConfig(r=8, lora_alpha=8, **common), 1e-2),
    "WaRA subband": Method(lambda **common: WaRAConfig(r=4, **common), 1e-2),
    "WaRA grid": Method(lambda **common: WaRAConfig(form="grid", r=2, **common), 1e-2),
}


def to_train(base: nn.Module, name: str) -> nn.Module:
    """The base with an adapter in all linear layers of its encoder and a decoder that trains."""
    config = METHODS[name].config
    if config is not None:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
        return get_peft_model(base, config(target_modules=targets, modules_to_save=["decode_head"]))
    if name != "full fine-tuning":
        base.requires_grad_(False).decode_head.requires_grad_(name == "decoder alone")
    return base


def adapter_parameters(model: nn.Module) -> int:
    """Trained numbers without those of the decoder."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "decode_head" not in name)


# 2. Training


def masks_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (N, classes, h, w) to masks (N, H, W): the evaluation keeps these, which are smaller."""
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear").argmax(1)


def mean_iou(prediction: EvalPrediction) -> dict[str, float]:
    """Mean over classes of |predicted ∩ true| / |predicted ∪ true|, both over all scenes."""
    found, true = prediction.predictions, prediction.label_ids
    classes = len(NAMES)
    confusion = np.bincount(classes * true.ravel() + found.ravel(), minlength=classes**2).reshape(classes, classes)
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    return {"mean_iou": float((both[either > 0] / either[either > 0]).mean())}


def trainer_of(model: nn.Module, scenes: Scenes, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        warmup_steps=0.1,  # less than one: a share of the steps
        per_device_eval_batch_size=50,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="no",
        report_to="none",
        **settings,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=scenes,
        compute_metrics=mean_iou,
        preprocess_logits_for_metrics=masks_of,
    )


def small_segformer() -> SegformerConfig:
    return SegformerConfig(
        num_channels=1,
        num_labels=len(NAMES),
        num_encoder_blocks=3,
        depths=[1, 1, 2],
        hidden_sizes=[32, 64, 96],
        num_attention_heads=[1, 2, 4],
        sr_ratios=[4, 2, 1],
        strides=[2, 2, 2],
        patch_sizes=[3, 3, 3],
        mlp_ratios=[2, 2, 2],
        decoder_hidden_size=64,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )


def pretrained(folder: Path, sizes: Sizes) -> Path:
    """Folder of the small SegFormer that knows the source's scenes, trained if it is not there."""
    if folder.exists():
        print(f"Pretrained model found in {folder}")
        return folder
    set_seed(0)
    model = AutoModelForSemanticSegmentation.from_config(small_segformer())
    scenes = Scenes(SOURCE, "train", sizes.pretraining_scenes, seed=0)
    trainer = trainer_of(
        model,
        scenes,
        folder.with_name("run"),
        max_steps=sizes.pretraining_steps,
        learning_rate=PRETRAINING_RATE,
        per_device_train_batch_size=PRETRAINING_BATCH_SIZE,
        save_strategy="no",
    )
    trainer.train()
    reached = trainer.evaluate(Scenes(SOURCE, "test", sizes.held_out, seed=1))
    print(f"Pretrained: mean IoU {reached['eval_mean_iou']:.3f} on the source's test scenes")
    part = folder.with_suffix(".part")
    trainer.save_model(str(part))
    part.rename(folder)  # a folder of that name is whole
    return folder


@dataclass(frozen=True)
class Study:
    """What is run: seeds, and rates, which None leaves to each method."""

    seeds: range
    rates: tuple[float, ...] | None
    folder: Path
    results: Path
    sizes: Sizes

    def cells(self) -> list[Cell]:
        """Seeds outside, so that no method has the machine's quiet hour to itself."""
        task = f"segmentation/{self.sizes.scenes} scenes"
        return [
            Cell(task, name, 8.0 if method.config else 0.0, rate, seed)
            for seed in self.seeds
            for name, method in METHODS.items()
            for rate in (self.rates if self.rates and method.rate else (method.rate,))
        ]

    def run(self) -> dict[Cell, dict[str, Any]]:
        """Run the cells that are not in the results yet, and return the results of all, in order."""
        store = Store(self.results, self.folder / "locks")
        left = [cell for cell in self.cells() if cell not in store.results()]
        if left:
            base = pretrained(self.folder / "pretrained", self.sizes)
            for cell in tqdm(left, unit="run"):
                with store.claim(cell) as mine:
                    if mine:
                        store.append(cell, self.run_cell(cell, base))
        results = store.results()
        return {cell: results[cell] for cell in self.cells() if cell in results}

    def run_cell(self, cell: Cell, base: Path) -> dict[str, Any]:
        """Adapt and judge; keep the masks of the first seed's first test scenes."""
        sizes = self.sizes
        set_seed(cell.seed)
        model = to_train(AutoModelForSemanticSegmentation.from_pretrained(base), cell.method)
        scenes = Scenes(TARGET, "train", sizes.scenes, cell.seed)
        trainer = trainer_of(
            model,
            scenes,
            self.folder / "run",
            max_steps=sizes.steps,
            learning_rate=cell.rate,
            per_device_train_batch_size=BATCH_SIZE,
            seed=cell.seed,
            save_strategy="no",
            disable_tqdm=True,  # there is one over all runs
        )
        trainer.remove_callback(PrinterCallback)
        seconds = trainer.train().metrics["train_runtime"] if cell.rate else 0.0
        result: dict[str, Any] = {}
        for split in ("validation", "test"):
            found = trainer.predict(Scenes(TARGET, split, sizes.held_out, cell.seed), metric_key_prefix=split)
            result[split] = found.metrics[f"{split}_mean_iou"]
        if cell.seed == SEEDS[0]:
            np.save(self.masks_path(cell.method), found.predictions[:SHOWN])
        return {**result, "parameters": adapter_parameters(model), "seconds": seconds, **environment()}

    def masks_path(self, method: str) -> Path:
        return self.folder / f"masks, {method}.npy"

    def draw(self, path: Path) -> None:
        """The masks that are kept, beside the true ones."""
        scenes = Scenes(TARGET, "test", self.sizes.held_out, SEEDS[0])
        masks = {"truth": scenes.labels[:SHOWN].numpy()}
        masks |= {name: np.load(self.masks_path(name)) for name in METHODS if self.masks_path(name).exists()}
        draw_masks(scenes.pixels[:SHOWN, 0].numpy(), masks, NAMES).savefig(path, dpi=150)


def main() -> None:
    args = parse_arguments()
    logging.disable_progress_bar()  # of loading; the training has its own
    study = Study(
        seeds=TUNING_SEEDS if args.tune else SEEDS if args.full else SEEDS[: 2 if args.quick else 1],
        rates=RATES if args.tune else None,
        folder=args.output_dir,
        results=args.results,
        sizes=QUICK if args.quick else Sizes(),
    )
    results = study.run()
    if args.tune:
        print(tuning_table(results, {name: method.rate for name, method in METHODS.items() if method.rate}))
        return
    print(table(results))
    study.draw(args.results / "segment_masks.png")
    print(f"Saved segmentation.jsonl and segment_masks.png in {args.results}")


if __name__ == "__main__":
    main()
