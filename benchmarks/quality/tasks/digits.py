"""Task (a): a small ViT that knows the digits 0 to 4 learns 5 to 9 from few images, which may look otherwise."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import vit_digits
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig

from quality.tasks.pretrained import cached
from quality.training import Problem, accuracy

SIZE = 16
PRETRAININGS = 3
CLASSES = 5
VALIDATION, TEST = 200, 300
DOMAINS = ("clean", "inverted", "shifted")
NOISE = 0.4
SHIFT = 1


def new_vit() -> nn.Module:
    config = ViTConfig(
        image_size=SIZE,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=CLASSES,
    )
    return AutoModelForImageClassification.from_config(config)


@lru_cache
def images(first: int, last: int) -> tuple[Tensor, Tensor]:
    """All images (N, 1, 16, 16) of these digits between -1 and 1, and their labels from 0."""
    found = vit_digits.digits(first, last, Namespace(image_size=SIZE, seed=0, smoke=False))
    pixels, labels = zip(*found.splits.values(), strict=True)
    return torch.cat(pixels), torch.cat(labels)


def pretrain(seed: int, epochs: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = new_vit()
    data = vit_digits.Images({"train": images(0, 4)}, [])
    vit_digits.train(model, data, epochs, vit_digits.PRETRAINING_RATE, f"pretraining {seed} of a ViT")
    return model.state_dict()


def seen_as(domain: str, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are, inverted and noisy, or moved by up to `SHIFT` pixels along each axis."""
    if domain == "inverted":
        return -pixels + NOISE * torch.randn(pixels.shape, generator=generator)
    if domain == "shifted":
        moves = torch.randint(-SHIFT, SHIFT + 1, (len(pixels), 2), generator=generator).tolist()
        padded = nn.functional.pad(pixels, [SHIFT] * 4, value=-1.0)
        parts = [
            image[:, SHIFT + down : SHIFT + down + SIZE, SHIFT + right : SHIFT + right + SIZE]
            for image, (down, right) in zip(padded, moves, strict=True)
        ]
        return torch.stack(parts)
    return pixels


@dataclass(frozen=True)
class Digits:
    """A share of the digits, in a domain of their own.

    Args:
        per_class: images of a class.
        domain: one of `DOMAINS`.
        batch_size: images of a batch.
        steps: of the training.
        pretraining_epochs: passes of the pretraining.
        judged: images that validation and test each take; None takes all.
        family: of the task.
    """

    per_class: int
    domain: str
    batch_size: int
    steps: int
    pretraining_epochs: int = 15
    judged: int | None = None
    family: str = "digits"
    metric = "accuracy"
    higher_is_better = True
    layers = "linear"
    has_grid = True
    attention = "vit"

    @property
    def name(self) -> str:
        return f"{self.family}/{self.domain}, {self.per_class} a class"

    def problem(self, seed: int) -> Problem:
        base = seed % PRETRAININGS
        model = copy.deepcopy(pretrained_vit(base, self.pretraining_epochs))
        torch.manual_seed(seed)
        model.classifier.reset_parameters()
        generator = torch.Generator().manual_seed(seed)
        pixels, labels = images(5, 9)
        pixels = seen_as(self.domain, pixels, generator)
        order = torch.randperm(len(labels), generator=generator)
        pool, held_out = order[VALIDATION + TEST :], order[: VALIDATION + TEST]
        chosen = torch.cat([pool[labels[pool] == label][: self.per_class] for label in range(CLASSES)])
        parts = {"train": chosen, "validation": held_out[:VALIDATION], "test": held_out[VALIDATION:]}
        parts = {name: part if name == "train" else part[: self.judged] for name, part in parts.items()}
        return Problem(
            model=model,
            targets=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
            head=["classifier"],
            splits={name: {"pixel_values": pixels[part], "labels": labels[part]} for name, part in parts.items()},
            batch_size=self.batch_size,
            steps=self.steps,
            score=accuracy,
            seed=seed,
        )


@lru_cache(maxsize=PRETRAININGS)
def pretrained_vit(seed: int, epochs: int) -> nn.Module:
    model = new_vit()
    model.load_state_dict(cached(f"vit_{seed}_{epochs}_epochs", partial(pretrain, seed, epochs)))
    return model


# The short ones take two seconds. No method has converged by then: what is compared is also how fast it learns.
TASKS = [Digits(8, domain, 8, 80) for domain in DOMAINS] + [Digits(40, domain, 12, 100) for domain in DOMAINS]
LONG = [Digits(40, domain, 12, 300, family="digits-long") for domain in DOMAINS[:2]]
