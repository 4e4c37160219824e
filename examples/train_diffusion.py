"""Adapt a class-conditional diffusion transformer to new classes from a few images by LoRA and WaRA, offline.

    python examples/train_diffusion.py              # one seed of all methods, from nothing
    python examples/train_diffusion.py --full       # five seeds
    python examples/train_diffusion.py --quick      # whether everything runs; the figures mean nothing
    accelerate launch examples/train_diffusion.py --base facebook/DiT-XL-2-256 --images my-images --method subband

A small DiT learns scikit-learn's digits 0 to 6 and is kept in --output-dir. Then it is adapted to 7, 8 and 9 from
twenty images, each time from the same weights: LoRA, WaRA "subband" and "grid", with equally many parameters in the
same layers, and in all cases the embeddings of the three classes (which are also trained alone). Samples are judged by
a classifier of all ten digits: by the Fréchet distance in 32 of its features to images that nothing was trained on,
and by how many of them it takes for the digit that was asked for. Seeds decide which images, first values, order and
noise. Finished runs are lines of JSON, and are not run again; interrupted ones go on from their last checkpoint.

With --base and --images (a folder with a folder for each class) it is a training script: one adapter, with checkpoints
and validation images. The class in the i-th folder, by name, takes the place of the model's class i.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

# huggingface_hub reads this when it is imported. Nothing is asked of the Hub unless something from there is named.
if not any(argument.startswith("--base") for argument in sys.argv):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import PartialState
from diffusion_digits import NEW
from diffusion_report import SEEDS, TUNING_SEEDS, table, tuning_table
from diffusion_study import METHODS, RATES, Study, adapted, draw
from diffusion_training import (
    Training,
    decoded,
    encoded,
    load_base,
    load_images,
    remove_checkpoints,
    sample,
    save_grid,
    train,
)
from study_options import make_folders, parse_study, stop, study_parser
from torch import nn

# 1. Options


def parse_arguments() -> argparse.Namespace:
    parser = study_parser(__doc__, "train_diffusion_output")
    add = parser.add_argument
    add("--count", type=int, default=20, help="images that the digits are learned from (default: 20)")
    add("--rank", type=int, default=4, help="LoRA's; the other methods have its parameters; 4, 8, … (default: 4)")
    add("--full", action="store_true", help=f"{len(SEEDS)} seeds in place of one")
    add("--base", help="DiT from the Hub or a local folder; with --images")
    add("--images", type=Path, help="folder with a folder for each class; with --base")
    add("--method", choices=list(METHODS), default="subband", help="adapter for --base (default: subband)")
    add("--steps", type=int, default=1000, help="of --base's adapter (default: 1000)")
    add("--batch-size", type=int, default=16, help="of --base's adapter, for each process (default: 16)")
    add("--learning-rate", type=float, help="of --base's adapter (default: the one of the digits)")
    add("--checkpoint-steps", type=int, default=200, help="between checkpoints and validations of it (default: 200)")
    args = parse_study(parser)
    if (args.base is None) != (args.images is None):
        stop("--base and --images go together: the small DiT knows digits alone")
    if args.rank < 4 or args.rank % 4:
        stop(f'--rank {args.rank} must be a multiple of 4, for "grid" has four pairs of factors where LoRA has one')
    for option, value, least in (
        ("--count", args.count, len(NEW)),
        ("--steps", args.steps, 1),
        ("--batch-size", args.batch_size, 1),
        ("--checkpoint-steps", args.checkpoint_steps, 1),
    ):
        if value < least:
            stop(f"{option} {value} must be at least {least}")
    make_folders(args)
    return args


# 2. An adapter for a model and images of one's own


def adapt(args: argparse.Namespace) -> None:
    """Train one adapter, and keep it, its checkpoints and its validation images in a folder of its own."""
    rate = args.learning_rate or METHODS[args.method][1]
    try:
        base, noise_scheduler, vae = load_base(args.base)
        size = base.config.sample_size * (2 ** (len(vae.config.block_out_channels) - 1) if vae else 1)
        names, pixels, labels = load_images(args.images, 3 if vae else base.config.in_channels, size)
        if len(names) > base.config.num_embeds_ada_norm:
            raise ValueError(f"{args.images} has {len(names)} classes, {args.base} {base.config.num_embeds_ada_norm}")
        model = adapted(base, args.method, args.rank, range(len(names)), seed=0)
    except (TypeError, ValueError, OSError) as error:
        stop(str(error))
    model.print_trainable_parameters()
    folder = args.output_dir / f"{args.method}-{args.rank}-{rate:g}-{args.steps}"
    shown = torch.arange(len(names)).repeat_interleave(4)

    def validate(model: nn.Module, step: int) -> None:
        found = sample(model, noise_scheduler, shown, 0, base.config)
        save_grid(decoded(found, vae), 4, folder / f"step-{step}.png", size=max(size, 64))

    every = args.checkpoint_steps
    training = Training(args.steps, args.batch_size, rate, checkpoint_steps=every, validation_steps=every)
    train(model, noise_scheduler, encoded(pixels, vae), labels, training, folder, validate)
    if PartialState().is_main_process:
        model.save_pretrained(str(folder / "adapter"))
        remove_checkpoints(folder)
        print(f"Saved the adapter and validation images in {folder}; classes: {', '.join(names)}")


def main() -> None:
    args = parse_arguments()
    if args.base:
        adapt(args)
        return
    folder = args.output_dir
    seeds = TUNING_SEEDS if args.tune else SEEDS if args.full else SEEDS[: 2 if args.quick else 1]
    study = Study(args.count, args.rank, seeds, RATES if args.tune else None, folder, args.results)
    if args.quick:
        study = replace(study, pretraining=Training(30, 64, 2e-3), steps=10, samples=30)
    results = study.run()
    if args.tune:
        print(tuning_table(results, {name: rate for name, (_, rate) in METHODS.items()}))
        return
    print(table(results))
    picture = study.results / "diffusion_samples.png"
    draw(study).savefig(picture, dpi=110)
    print(f"Saved {picture}")


if __name__ == "__main__":
    main()
