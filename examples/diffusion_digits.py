"""scikit-learn's digits for diffusion models, and a judge of samples: a classifier of all ten digits.

Half of the images of each digit (the pool) are for training: what a model is adapted to is drawn from them, and the
judge has learned them. Samples are compared with the other half, which nothing has seen; learning rates were chosen by
comparing with the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIZE = 8
OLD, NEW = range(7), range(7, 10)
FEATURES = 32
JUDGE_STEPS, JUDGE_BATCH, JUDGE_RATE = 500, 64, 2e-3


@dataclass(frozen=True)
class Digits:
    """Pixels (N, 1, 8, 8) between -1 and 1, and labels (N,)."""

    pixels: Tensor
    labels: Tensor

    def of(self, digits: range) -> Digits:
        """Those that show one of these digits."""
        chosen = torch.isin(self.labels, torch.tensor(digits))
        return Digits(self.pixels[chosen], self.labels[chosen])

    def draw(self, count: int, seed: int) -> Digits:
        """`count` images by chance, of each digit as many as of the others, or one more."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        by_digit = [order[self.labels[order] == digit] for digit in self.labels.unique()]
        chosen = torch.tensor(
            [int(rows[i]) for i in range(max(map(len, by_digit))) for rows in by_digit if i < len(rows)]
        )
        return Digits(self.pixels[chosen[:count]], self.labels[chosen[:count]])


def load_halves() -> tuple[Digits, Digits]:
    """The pool, and the half to compare with; always the same."""
    found = load_digits()
    pixels = torch.tensor(found.images / 8 - 1, dtype=torch.float32).unsqueeze(1)
    whole = Digits(pixels, torch.tensor(found.target))
    order = whole.draw(len(whole.labels), seed=0)  # digits in turn, so that both halves have as many of each
    rows = torch.arange(len(order.labels)) // 10 % 2 == 0
    return Digits(order.pixels[rows], order.labels[rows]), Digits(order.pixels[~rows], order.labels[~rows])


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of the normal distributions that fit features (N, d) and (M, d) best.

    In float64. (Σ₁ Σ₂)^½ has the eigenvalues of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric.
    """
    first, second = first.double(), second.double()
    covariances = [features.T.cov() for features in (first, second)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return float(means + covariances[0].trace() + covariances[1].trace() - 2 * overlap)


class Judge(nn.Module):
    """A small CNN; 32 features are between its two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * (SIZE // 2) ** 2, FEATURES),
        )
        self.head = nn.Sequential(nn.GELU(), nn.Linear(FEATURES, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))

    @torch.no_grad()
    def accuracy(self, images: Digits) -> float:
        """Share of the images that are taken for what their labels say."""
        return (self(images.pixels).argmax(1) == images.labels).float().mean().item()

    @torch.no_grad()
    def distance(self, images: Digits, others: Digits) -> float:
        """The Fréchet distance of two sets of images, in the 32 features."""
        return frechet_distance(self.features(images.pixels), self.features(others.pixels))


def load_judge(pool: Digits, path: Path) -> Judge:
    """The judge that has learned the pool, trained where it is not at `path`."""
    torch.manual_seed(0)
    judge = Judge()
    if path.exists():
        judge.load_state_dict(load_file(path))
        return judge.eval()
    optimizer = torch.optim.AdamW(judge.parameters(), JUDGE_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, JUDGE_STEPS)
    for _ in range(JUDGE_STEPS):
        rows = torch.randint(len(pool.labels), (JUDGE_BATCH,))
        loss = F.cross_entropy(judge(pool.pixels[rows]), pool.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), path)
    return judge.eval()
