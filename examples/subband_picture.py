"""A picture of where an adapter has changed its model: the energy of ΔW by kind of layer, block and subband."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from wara_peft.layers.base import WaRALayer


def draw_energy(model: nn.Module, path: Path) -> None:
    """Draw each layer's share of ‖ΔW‖² by subband: ‖B_s A_s‖² over its sum, for the transform keeps norms.

    (It does where 2^levels divides the layer's sizes; on other sizes the shares are those of the coefficients.)
    Layers whose names differ only in a number, that of their block, share a panel, with a row for each block.
    """
    layers = [module for module in model.modules() if isinstance(module, WaRALayer)]
    subbands = layers[0].wara_A["default"].subbands
    panels: dict[str, dict[str, torch.Tensor]] = {}
    for layer in layers:
        energy = torch.stack(
            [
                (layer.wara_B["default"].subband(name) @ layer.wara_A["default"].subband(name)).square().sum()
                for name in subbands
            ]
        )
        number = re.search(r"\.(\d+)\.", layer.module_name)
        kind = re.sub(r"^.*\.\d+\.", "", layer.module_name)
        panels.setdefault(kind, {})[number[1] if number else ""] = (100 * energy / energy.sum()).detach().cpu()

    shares = {kind: torch.stack(list(rows.values())).numpy() for kind, rows in panels.items()}
    largest, rows = max(share.max() for share in shares.values()), max(map(len, shares.values()))
    width, height = 1.2 + len(shares) * max(0.35 * len(subbands), 1.2), 1.4 + 0.18 * rows
    figure = Figure(figsize=(width, height), layout="constrained")
    axes_of = figure.subplots(1, len(shares), squeeze=False)[0]
    for axes, (kind, share) in zip(axes_of, shares.items(), strict=True):
        image = axes.imshow(share, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
        for (row, column), value in np.ndenumerate(share):
            color = "white" if value < largest / 2 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", size=5, color=color)
        axes.set_xticks(range(len(subbands)), subbands, size=6, rotation=90)
        axes.set_yticks(range(len(share)), panels[kind], size=6)
        axes.set_title(kind.replace(".", "\n"), size=7)
    axes_of[0].set_ylabel("block")
    figure.colorbar(image, ax=list(axes_of), label="% of ‖ΔW‖² of the layer")
    figure.suptitle("Energy of ΔW by subband", size=10)
    figure.savefig(path, dpi=150)
