"""Let a budget find the ranks: one call before training, its table and its picture, offline, in two minutes.

    python examples/allocate_ranks.py
    python examples/allocate_ranks.py --like 2 --levels 2

A small ViT that knows the digits 0 to 4 (made as in vit_digits.py, and kept in --output-dir) is adapted to 5 to 9. The
gradient of a few batches says which subbands of which layers gain most by a parameter. Then LoRA, WaRA with one rank
for all, and WaRA with these ranks are trained, each with the parameters of LoRA r=--like. One seed says little:
benchmarks/quality has the comparison over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import vit_digits
from peft import LoraConfig, PeftConfig, get_peft_model
from study_options import make_folder, stop
from transformers import AutoModelForImageClassification

from wara_peft import WaRAConfig, allocate_ranks

BATCHES = 8
RATE = 1e-2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--like", type=int, default=4, help="the budget is that of a LoRA of this even rank (default: 4)")
    add("--levels", type=int, default=1, help="levels of the wavelet decomposition (default: 1)")
    add("--epochs", type=int, default=15, help="passes over the training images of each adaptation (default: 15)")
    add("--seed", type=int, default=0, help="seed of splits, first values and order of images (default: 0)")
    add("--output-dir", type=Path, default=Path("allocate_ranks_output"), help="default: allocate_ranks_output")
    add("--smoke", action="store_true", help="one epoch on a few images: shows in seconds whether everything runs")
    args = parser.parse_args()
    args.image_size = 16
    if args.like < 2 or args.like % 2:
        stop(f"--like {args.like} must be even and at least 2: a WaRA of half of it has as many parameters")
    if args.epochs < 1:
        stop(f"--epochs {args.epochs} is too small")
    make_folder("--output-dir", args.output_dir)
    return args


def main() -> None:
    args = parse_arguments()
    targets = {"target_modules": "all-linear", "exclude_modules": ["classifier"], "modules_to_save": ["classifier"]}
    images = vit_digits.digits(5, 9, args)
    base = AutoModelForImageClassification.from_pretrained(vit_digits.pretrained(args))
    model = vit_digits.with_fresh_head(base, args.seed)
    pixels, labels = (part.split(vit_digits.BATCH_SIZE) for part in images.splits["train"])
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]

    lora = LoraConfig(r=args.like, lora_alpha=args.like, **targets)
    try:
        config = WaRAConfig(levels=args.levels, **targets)
        config, report = allocate_ranks(model, config, batches, like=lora, batches=BATCHES)
    except ValueError as error:
        stop(str(error))
    print(report)
    report.plot(args.output_dir / "ranks.png")

    configs: dict[str, PeftConfig] = {f"LoRA r={args.like}": lora, "WaRA, ranks by gradient": config}
    if args.levels == 1:
        configs[f"WaRA r={args.like // 2}"] = WaRAConfig(r=args.like // 2, **targets)
    print(f"\n{'':24}{'validation':>12}{'test':>8}{'adapter parameters':>20}")
    for name, chosen in configs.items():
        adapted = get_peft_model(vit_digits.with_fresh_head(base, args.seed), chosen)
        vit_digits.train(adapted, images, 1 if args.smoke else args.epochs, RATE, name)
        scores = [vit_digits.accuracy(adapted, images, part) for part in ("val", "test")]
        print(f"{name:24}{scores[0]:>12.3f}{scores[1]:>8.3f}{vit_digits.adapter_parameters(adapted):>20,}")
    print(f"\nSaved {args.output_dir / 'ranks.png'}")


if __name__ == "__main__":
    main()
