"""The pictures of compare_attention.py: what it measured, and which words LAMA's heads look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window: pictures go to files

import matplotlib.pyplot as plt
from torch import Tensor


def draw_accuracies(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against trained parameters of the attention, one panel for each setting."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = plt.subplots(1, len(settings), figsize=(7 * len(settings), 5), layout="constrained", squeeze=False)
    for panel, setting in zip(axes[0], settings, strict=True):
        for i, row in enumerate(row for row in rows if row["setting"] == setting):
            panel.errorbar(
                row["attention_parameters"],
                100 * row["accuracy_mean"],
                100 * row["accuracy_interval"],
                fmt="osD^vP"[i],
                capsize=3,
                label=row["model"],
            )
        panel.set_xscale("log")
        panel.set_xlabel("trained parameters of the attention")
        panel.set_ylabel("test accuracy in %, mean and 95% interval")
        panel.set_title(setting)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_step_times(step_times: list[dict[str, Any]], path: Path) -> None:
    """Time of forward and backward by length, as a ratio to `nn.MultiheadAttention`."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    lengths = [entry["length"] for entry in step_times]
    for name in step_times[0]["ratio"]:
        axes.plot(lengths, [entry["ratio"][name] for entry in step_times], marker="o", label=name)
    axes.axvline(512, color="grey", linestyle=":", label="512 tokens, where the published claim turns")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("sequence length")
    axes.set_ylabel("time of a step / that of full attention")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_attention(texts: list[tuple[list[str], str, str, Tensor]], path: Path) -> None:
    """Which words LAMA's heads look at.

    Args:
        texts: for each its words, label, prediction, and weights of shape (heads, words).
        path: file to write.
    """
    height = 1.2 + 0.13 * texts[0][3].shape[0]
    figure, axes = plt.subplots(len(texts), 1, figsize=(11, height * len(texts)), layout="constrained", squeeze=False)
    # Relative to uniform weights, so that texts of all lengths share one scale around 1.
    relative = [weights * len(words) for words, _, _, weights in texts]
    largest = max(float(values.max()) for values in relative)
    for panel, (words, label, prediction, _), values in zip(axes[:, 0], texts, relative, strict=True):
        image = panel.imshow(values.numpy(), cmap="viridis", aspect="auto", vmin=0, vmax=largest)
        panel.set_xticks(range(len(words)), words, rotation=60, ha="right", size=7)
        panel.set_ylabel("head")
        panel.set_title(f"from {label}, classified as {prediction}", size=9)
    figure.colorbar(image, ax=axes[:, 0], label="attention weight / uniform weight")
    figure.savefig(path, dpi=150)
    plt.close(figure)
