"""Adapt a small vision transformer to new digits by five methods, offline, in two to three minutes on two CPU cores.

    python examples/vit_digits.py                        # scikit-learn's digits, 16 x 16 pixels, patches of 2 x 2
    python examples/vit_digits.py --image-size 32 --levels 2
    python examples/vit_digits.py --model google/vit-base-patch16-224-in21k --dataset beans --max-images 500

A ViT learns the digits 0 to 4 and is kept in --output-dir, where the next run finds it. Then it is adapted to the
digits 5 to 9, each time from the same weights and with a fresh head: the head alone, all weights, LoRA, and the WaRA
forms "subband", "grid" and "tiny". A table compares them, and a picture shows what each subband of the "grid" adapter
adds to which patches. LoRA, "subband" and "grid" have equally many parameters; learning rates were chosen on the
validation split. One seed on a few hundred small images says little about other tasks: try it on yours.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# huggingface_hub reads this when it is imported. Nothing is asked of the Hub unless something from there is named.
if not any(argument.startswith(("--model", "--dataset")) for argument in sys.argv):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from datasets import load_dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from study_options import make_folder, stop
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, set_seed

from wara_peft import WaRAConfig
from wara_peft.layers.base import WaRALayer

matplotlib.use("Agg")  # no window: the picture goes to a file

BATCH_SIZE = 32
PRETRAINED = "pretrained_on_0_to_4"
PRETRAINING_EPOCHS, PRETRAINING_RATE = 30, 1e-3


@dataclass
class Images:
    """Pixels (N, channels, height, width) and labels (N,) of the splits, and a name for each label."""

    splits: dict[str, tuple[Tensor, Tensor]]
    names: list[str]


# 1. Options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", help="image classifier from the Hub or a local folder (default: a small ViT that is trained here)")
    add("--dataset", help="image data set from the Hub or a local folder (default: the digits 5 to 9)")
    add("--image-column", default="image", help="column of --dataset with the image (default: image)")
    add("--label-column", default="labels", help="column of --dataset with the label (default: labels)")
    add("--max-images", type=int, default=2000, help="images of --dataset that are used in all (default: 2000)")
    add("--image-size", type=int, default=16, help="size to which the digits are scaled; even (default: 16)")
    add("--epochs", type=int, default=15, help="passes over the training images of each adaptation (default: 15)")
    add("--levels", type=int, default=1, help="levels of the wavelet decompositions (default: 1)")
    add("--wavelet", default="haar", help="an orthogonal PyWavelets wavelet (default: haar)")
    add("--seed", type=int, default=0, help="seed of splits, first values and order of images (default: 0)")
    add("--output-dir", type=Path, default=Path("vit_digits_output"), help="folder (default: vit_digits_output)")
    add("--smoke", action="store_true", help="one epoch on a few images: shows in seconds whether everything runs")
    args = parser.parse_args()
    if (args.model is None) != (args.dataset is None):
        stop("--model and --dataset go together: the small ViT knows digits alone")
    if args.image_size < 8 or args.image_size % 2:
        stop(f"--image-size {args.image_size} must be even and at least 8")
    for option, value in (("--epochs", args.epochs), ("--max-images", args.max_images // 20)):
        if value < 1:
            stop(f"{option} is too small")
    make_folder("--output-dir", args.output_dir)
    return args


# 2. Images


def digits(first: int, last: int, args: argparse.Namespace) -> Images:
    """The digits first ... last of scikit-learn (8 x 8 pixels), scaled, as grey images between -1 and 1."""
    found = load_digits()
    pixels = torch.tensor(found.images / 8 - 1, dtype=torch.float32).unsqueeze(1)
    pixels = F.interpolate(pixels, size=(args.image_size, args.image_size), mode="bilinear")
    labels = torch.tensor(found.target)
    chosen = (first <= labels) & (labels <= last)
    names = [str(digit) for digit in range(first, last + 1)]
    return Images(split(pixels[chosen], labels[chosen] - first, args), names)


def named_images(args: argparse.Namespace) -> Images:
    """Images of a data set, as the model's own processor prepares them."""
    dataset = load_dataset(args.dataset, split="train").shuffle(seed=args.seed)
    rows = dataset.select(range(min(args.max_images, len(dataset))))
    processor = AutoImageProcessor.from_pretrained(args.model)
    pictures = [image.convert("RGB") for image in rows[args.image_column]]
    pixels = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures])
    values = sorted(set(rows[args.label_column]))
    labels = torch.tensor([values.index(value) for value in rows[args.label_column]])
    return Images(split(pixels, labels, args), [str(value) for value in values])


def split(pixels: Tensor, labels: Tensor, args: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Half of the images to train, a quarter to validate and a quarter to test."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
    if args.smoke:
        order = order[:64]
    parts = order.tensor_split((len(order) // 2, len(order) * 3 // 4))
    return {name: (pixels[part], labels[part]) for name, part in zip(("train", "val", "test"), parts, strict=True)}


# 3. Training


def train(model: nn.Module, images: Images, epochs: int, learning_rate: float, title: str) -> float:
    """Train what requires gradients with AdamW and a linear decay; returns the seconds it took."""
    pixels, labels = images.splits["train"]
    batches = -(-len(labels) // BATCH_SIZE)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * batches)
    start = time.perf_counter()
    model.train()
    for _ in tqdm(range(epochs), desc=title, leave=False):
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            loss = F.cross_entropy(model(pixel_values=pixels[batch]).logits, labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, name: str) -> float:
    pixels, labels = images.splits[name]
    found = torch.cat([model(pixel_values=part).logits.argmax(1) for part in pixels.split(BATCH_SIZE)])
    return (found == labels).float().mean().item()


def pretrained(args: argparse.Namespace) -> Path:
    """Folder of the small ViT that knows the digits 0 to 4, trained if it is not there."""
    variant = f"size{args.image_size}_seed{args.seed}{'_smoke' if args.smoke else ''}"
    folder = args.output_dir / PRETRAINED / variant
    if (folder / "config.json").exists():
        print(f"Pretrained model found in {folder}")
        return folder
    set_seed(args.seed)
    config = ViTConfig(
        image_size=args.image_size,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=5,
    )
    model = AutoModelForImageClassification.from_config(config)
    images = digits(0, 4, args)
    seconds = train(model, images, 1 if args.smoke else PRETRAINING_EPOCHS, PRETRAINING_RATE, "pretraining")
    print(f"Pretrained on the digits 0 to 4 in {seconds:.0f} s, test accuracy {accuracy(model, images, 'test'):.3f}")
    model.save_pretrained(folder)
    return folder


def with_fresh_head(base: nn.Module, seed: int) -> nn.Module:
    """A copy of the pretrained model with a new head, the same one each time."""
    set_seed(seed)
    model = copy.deepcopy(base)
    model.classifier.reset_parameters()
    return model


# 4. The five methods, and the head alone


def methods(args: argparse.Namespace) -> dict[str, tuple[Callable[[], PeftConfig | None], float]]:
    """For each method its adapter's config, or None without an adapter, and its learning rate."""
    targets = {"target_modules": "all-linear", "exclude_modules": ["classifier"], "modules_to_save": ["classifier"]}
    wavelet = {"wavelet": args.wavelet, "levels": args.levels}
    return {
        "head alone": (lambda: None, 3e-2),
        "full fine-tuning": (lambda: None, 1e-3),
        "LoRA r=8": (lambda: LoraConfig(r=8, lora_alpha=8, **targets), 1e-2),
        "WaRA subband r=4": (lambda: WaRAConfig(r=4, **wavelet, **targets), 2e-2),
        "WaRA grid r=2": (lambda: WaRAConfig(form="grid", r=2, **wavelet, **targets), 1e-2),
        "WaRA tiny r=8": (lambda: WaRAConfig(form="tiny", r=8, **wavelet, **targets), 1e-1),
    }


def adapter_parameters(model: nn.Module) -> int:
    """Trained numbers without those of the head."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name)


# 5. The picture


@torch.no_grad()
def draw_responses(model: PeftModel, images: Images, path: Path) -> None:
    """For an image of each class, what each subband of the grid adapters adds to which patches.

    Drawn is ‖scaling · B_s P_s(A_s x)‖ of every patch, relative to ‖result of the base layer‖, averaged over layers.
    """
    pixels, labels = images.splits["test"]
    shown = [int((labels == label).nonzero()[0]) for label in labels.unique()[:5]]
    maps: dict[str, list[Tensor]] = {}

    def add(layer: WaRALayer, args: tuple[Tensor, ...]) -> None:
        mixing = layer.token_mixing["default"]
        mixed = mixing(args[0] @ layer.wara_A["default"]().T)
        prefix, rows, columns = mixing.grid.split(mixed.shape[1])
        base = layer.base_layer(args[0])[:, prefix:].norm(dim=-1)
        start = 0
        for name, rank in layer.wara_A["default"].ranks.items():
            part = slice(start, start + rank)
            added = layer.scaling["default"] * mixed[..., part] @ layer.wara_B["default"]()[:, part].T
            relative = added[:, prefix:].norm(dim=-1) / base
            maps.setdefault(name, []).append(relative.view(-1, rows, columns))
            start += rank

    hooks = [m.register_forward_pre_hook(add) for m in model.modules() if isinstance(m, WaRALayer)]
    model(pixel_values=pixels[shown])
    for hook in hooks:
        hook.remove()

    means = {name: torch.stack(parts).mean(0) for name, parts in maps.items()}
    top = max(mean.max().item() for mean in means.values())
    figure, axes = plt.subplots(
        len(shown),
        1 + len(means),
        figsize=(1.6 * (1 + len(means)), 1.6 * len(shown)),
        squeeze=False,
        layout="constrained",
    )
    for row, index in enumerate(shown):
        image = pixels[index].permute(1, 2, 0)
        image = (image - image.min()) / (image.max() - image.min())
        axes[row][0].imshow(image, cmap="gray")
        axes[row][0].set_ylabel(images.names[labels[index]], rotation=0, labelpad=10)
        for column, (name, mean) in enumerate(means.items(), start=1):
            drawn = axes[row][column].imshow(mean[row], cmap="magma", vmin=0, vmax=top)
            if row == 0:
                axes[row][column].set_title(name)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(drawn, ax=axes, label="added by the subband, relative to the base layer")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    args = parse_arguments()
    try:
        configs = {name: make() for name, (make, _) in methods(args).items()}
        images = digits(5, 9, args) if args.dataset is None else named_images(args)
        source = pretrained(args) if args.model is None else args.model
        base = AutoModelForImageClassification.from_pretrained(
            source, num_labels=len(images.names), ignore_mismatched_sizes=True
        )
    except (TypeError, ValueError, OSError, KeyError, RuntimeError) as error:
        stop(str(error))
    sizes = ", ".join(f"{len(labels)} {name}" for name, (_, labels) in images.splits.items())
    print(f"Adapting to {', '.join(images.names)}: {sizes} images\n")

    header = f"{'':18}{'validation':>12}{'test':>8}{'adapter parameters':>20}{'seconds':>9}"
    lines = [header]
    print(header)
    for name, (_, learning_rate) in methods(args).items():
        model = with_fresh_head(base, args.seed)
        if configs[name] is not None:
            model = get_peft_model(model, configs[name])
        elif name == "head alone":
            model.requires_grad_(False).classifier.requires_grad_(True)
        seconds = train(model, images, 1 if args.smoke else args.epochs, learning_rate, name)
        scores = [accuracy(model, images, part) for part in ("val", "test")]
        lines.append(f"{name:18}{scores[0]:>12.3f}{scores[1]:>8.3f}{adapter_parameters(model):>20,}{seconds:>9.0f}")
        print(lines[-1])
        if "grid" in name:
            draw_responses(model, images, args.output_dir / "grid_responses.png")
    (args.output_dir / "table.txt").write_text("\n".join(lines) + "\n")
    print(f"\nSaved table.txt and grid_responses.png in {args.output_dir}")


if __name__ == "__main__":
    main()
