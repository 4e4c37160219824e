"""Scenes for semantic segmentation, offline: scikit-learn's digits placed on a textured canvas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.utils.data import Dataset

SIZE = 48
NAMES = ("background", *map(str, range(10)))
"""The classes. A pixel belongs to a digit where there is enough of its ink."""
ENOUGH_INK = 0.3
TRIES = 6
"""How often a digit is placed in a scene; where it would lie on another one it is left out."""


def clouds(count: int, generator: Generator) -> Tensor:
    """Dark blots: (count, SIZE, SIZE) between 0 and 0.5."""
    coarse = torch.rand(count, 1, 5, 5, generator=generator)
    return 0.5 * F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1).squeeze(1)


def stripes(count: int, generator: Generator) -> Tensor:
    """Stripes of any direction, of 5 to 12 pixels each: (count, SIZE, SIZE) between 0 and 0.7."""
    angle, period, phase, height = torch.rand(4, count, 1, 1, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = rows * (math.pi * angle).sin() + columns * (math.pi * angle).cos()
    waves = torch.sin(2 * math.pi * (along / (5 + 7 * period) + phase))
    return 0.35 + 0.35 * (0.4 + 0.6 * height) * waves


@dataclass(frozen=True)
class Style:
    """What scenes of a kind look like.

    Attributes:
        texture: draws canvases.
        sizes: the smallest and the largest size of a digit, in pixels.
        noise: standard deviation of what is added to each pixel, which lie between -1 and 1.
    """

    texture: Callable[[int, Generator], Tensor]
    sizes: tuple[int, int]
    noise: float


SOURCE = Style(clouds, sizes=(14, 20), noise=0.0)
TARGET = Style(stripes, sizes=(11, 17), noise=0.2)


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """Ink (1797, 8, 8) between 0 and 1, and labels (1797,), in an order of no meaning."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]


PARTS = {"train": range(1000), "validation": range(1000, 1300), "test": range(1300, 1797)}
"""The digits that scenes of a split are made of."""


class Scenes(Dataset):
    """Scenes of one kind, all of them drawn at once.

    An item is what the model takes: `pixel_values` (1, SIZE, SIZE) and `labels` (SIZE, SIZE), places in `NAMES`.

    Args:
        style: of the scenes.
        split: "train", "validation" or "test"; no digit is in two of them.
        count: number of scenes.
        seed: of all that is drawn.
    """

    def __init__(self, style: Style, split: str, count: int, seed: int) -> None:
        # A sequence of its own for each split, or they would share textures and places.
        generator = torch.Generator().manual_seed(len(PARTS) * seed + list(PARTS).index(split))
        ink, names = digits()
        canvases = style.texture(count, generator)
        self.labels = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
        for canvas, labels in zip(canvases, self.labels, strict=True):
            for _ in range(TRIES):
                (chosen,) = torch.randint(PARTS[split].start, PARTS[split].stop, (1,), generator=generator).tolist()
                (size,) = torch.randint(style.sizes[0], style.sizes[1] + 1, (1,), generator=generator).tolist()
                top, left = torch.randint(SIZE - size + 1, (2,), generator=generator).tolist()
                area = slice(top, top + size), slice(left, left + size)
                if labels[area].any():
                    continue
                drawn = F.interpolate(ink[None, None, chosen], size=(size, size), mode="bilinear")[0, 0]
                canvas[area] = canvas[area] * (1 - drawn) + drawn
                labels[area] = torch.where(drawn > ENOUGH_INK, names[chosen] + 1, 0)
        noise = style.noise * torch.randn(canvases.shape, generator=generator)
        self.pixels = (2 * canvases - 1 + noise).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}
