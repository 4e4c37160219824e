"""What a saved adapter holds: shapes, ranks, parameters, and where among the subbands its energy lies."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..disk.adapters.adapter import SavedAdapter, Track, no_progress_bar
from ..layers.as_lora import common_rank
from ..wavelet import Subband, subbands
from .heatmaps import draw_heatmaps


@dataclass(frozen=True)
class ModuleReport:
    """One adapted module.

    Attributes:
        name, kind, out_features, in_features, groups: what is adapted; of a convolution the in channels of one group.
        ranks: rank of each subband.
        rank: R, the rank of the LoRA that the adapter is.
        parameters: numbers that are trained for it.
        lora_parameters: numbers in the LoRA of rank R that it exports to; None for `form="grid"`, which is none.
        energy: for each subband ‖scaling · B_s A_s‖², the squared Frobenius norm of its coefficients. They add up to
            ‖ΔW‖² where 2^L divides both lengths and `aa0` has no rank.
        experts: number of experts of a stack of matrices, each of which has these ranks; 0 for all else.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    groups: int
    ranks: dict[str, int]
    rank: int
    parameters: int
    lora_parameters: int | None
    energy: dict[str, float]
    experts: int = 0


@dataclass(frozen=True)
class AdapterReport:
    """A saved adapter: its settings, its modules, and `others`, the keys of what it holds besides factors."""

    form: str
    wavelet: str
    levels: int
    base_model: str | None
    modules: list[ModuleReport]
    others: list[str]

    @property
    def rank(self) -> int:
        """Rank of the LoRA that it exports to: the largest R of its modules, or the next that all groups divide."""
        return common_rank((module.rank, module.groups) for module in self.modules)

    @property
    def lora_parameters(self) -> int | None:
        """Numbers in the LoRA that it exports to, whose modules all have that rank; None for `form="grid"`."""
        if any(module.lora_parameters is None for module in self.modules):
            return None
        return sum((module.lora_parameters or 0) // module.rank * self.rank for module in self.modules)

    @property
    def subbands(self) -> list[str]:
        """Names of all subbands that have a rank somewhere, coarsest level first."""
        used = {name for module in self.modules for name in module.ranks}
        return [band.name for band in subbands(self.levels) if band.name in used]

    def energy_shares(self) -> dict[str, float]:
        """Share of the energy of all modules that lies in each subband; zeros if there is none at all."""
        sums = {name: sum(module.energy.get(name, 0.0) for module in self.modules) for name in self.subbands}
        return _shares(sums)

    def level_shares(self) -> dict[str, float]:
        """The same by level: `approximation` (of the coarsest level), `level 1` ... `level L` (details), `level 0`."""
        sums: dict[str, float] = {}
        for name, share in self.energy_shares().items():
            level = "approximation" if name == f"aa{self.levels}" else f"level {Subband.named(name).level}"
            sums[level] = sums.get(level, 0.0) + share
        return sums

    def as_dict(self) -> dict[str, Any]:
        """Everything here as plain values, for JSON."""
        return {
            **dataclasses.asdict(self),
            "rank": self.rank,
            "lora_parameters": self.lora_parameters,
            "energy_shares": self.energy_shares(),
            "level_shares": self.level_shares(),
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw heatmaps of modules × subbands into an image file: the ranks, and the shares of each module's energy.

        The file appears, or takes the place of an old one, when it is complete.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: matplotlib does not know the ending of the file's name.
        """
        shares = [_shares(module.energy) for module in self.modules]
        draw_heatmaps(
            path,
            f"{self.form}, {self.wavelet}, levels={self.levels}",
            [module.name for module in self.modules],
            self.subbands,
            {
                "Rank": [[module.ranks.get(name, 0) for name in self.subbands] for module in self.modules],
                "Share of each module's energy": [[row.get(name, 0.0) for name in self.subbands] for row in shares],
            },
        )


@torch.no_grad()
def inspect_adapter(adapter: SavedAdapter, track: Track = no_progress_bar) -> AdapterReport:
    """Describe a saved adapter; its base model is not needed.

    Args:
        adapter: the adapter.
        track: wraps the loop over module names, to show progress.
    """
    config = adapter.config
    return AdapterReport(
        form=config.form,
        wavelet=config.wavelet,
        levels=config.levels,
        base_model=config.base_model_name_or_path,
        modules=[_inspect_module(adapter, name) for name in track(adapter.modules)],
        others=list(adapter.others),
    )


def _inspect_module(adapter: SavedAdapter, name: str) -> ModuleReport:
    shape, coefficients = adapter.modules[name], adapter.coefficients(name)
    kernel = 1 if shape.experts else math.prod(next(iter(coefficients.values()))[0].shape[2:])
    rank = adapter.rank(name)
    lora_parameters = rank * (shape.groups**2 * shape.in_features * kernel + shape.out_features)
    return ModuleReport(
        name=name,
        kind=shape.kind.name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        groups=shape.groups,
        ranks={band: columns.shape[-1] for band, (_, columns) in coefficients.items()},
        rank=rank * shape.groups,
        parameters=adapter.parameters(name),
        lora_parameters=lora_parameters * max(shape.experts, 1)
        if adapter.config.form_object.has_delta_weight
        else None,
        energy={band: _energy(*pair) for band, pair in coefficients.items()},
        experts=shape.experts,
    )


def _energy(rows: Tensor, columns: Tensor) -> float:
    """‖B_s A_s‖² = ⟨B_sᵀ B_s, A_s A_sᵀ⟩, from two r × r matrices; of experts the sum over all of them."""
    rows, columns = rows.double(), columns.double()
    if columns.ndim == 2:
        rows = rows.flatten(1)
    return float(((columns.mT @ columns) * (rows @ rows.mT)).sum())


def _shares(sums: dict[str, float]) -> dict[str, float]:
    total = sum(sums.values())
    return {name: value / total if total > 0 else 0.0 for name, value in sums.items()}
