"""Reports on a saved adapter: shapes, ranks, numbers of parameters, and how its energy is spread over subbands."""

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
    """The report on one adapted module.

    Attributes:
        name, kind, out_features, in_features, groups: the module's name, kind and shape. For a convolution
            `in_features` counts the in channels of one group.
        ranks: rank of each subband.
        rank: R, the rank of the LoRA that equals the adapter in this module.
        parameters: how many numbers are trained for the module.
        lora_parameters: how many numbers the exported LoRA of rank R has; None for `form="grid"`, which cannot be
            exported as a LoRA.
        energy: for each subband ‖scaling · B_s A_s‖², the squared Frobenius norm of its coefficients. The energies add
            up to ‖ΔW‖² if 2^L divides both lengths and `aa0` has no rank.
        experts: number of experts in a stack of matrices, each of which has these ranks; 0 for other kinds.
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
    """The report on a saved adapter.

    Attributes:
        form, wavelet, levels: fields of its config.
        base_model: name or path of its base model, if the config has it.
        modules: the reports on its modules.
        others: keys of the tensors that it holds besides factors, such as biases.
    """

    form: str
    wavelet: str
    levels: int
    base_model: str | None
    modules: list[ModuleReport]
    others: list[str]

    @property
    def rank(self) -> int:
        """Rank of the exported LoRA, which is the same for all modules: the largest R, rounded up to a multiple of all
        convolutions' groups."""
        return common_rank((module.rank, module.groups) for module in self.modules)

    @property
    def lora_parameters(self) -> int | None:
        """How many numbers the exported LoRA has, whose modules all have the same rank; None for `form="grid"`."""
        if any(module.lora_parameters is None for module in self.modules):
            return None
        return sum((module.lora_parameters or 0) // module.rank * self.rank for module in self.modules)

    @property
    def subbands(self) -> list[str]:
        """Names of all subbands that have a rank somewhere, coarsest level first."""
        used = {name for module in self.modules for name in module.ranks}
        return [band.name for band in subbands(self.levels) if band.name in used]

    def energy_shares(self) -> dict[str, float]:
        """Give each subband's share of the energy of all modules; all shares are zero if ΔW is zero."""
        sums = {name: sum(module.energy.get(name, 0.0) for module in self.modules) for name in self.subbands}
        return _shares(sums)

    def level_shares(self) -> dict[str, float]:
        """Give each level's share of the energy of all modules.

        The keys are `approximation` (of the coarsest level L), `level 1` ... `level L` (details), and `level 0` for
        `aa0`, the undecomposed matrix.
        """
        sums: dict[str, float] = {}
        for name, share in self.energy_shares().items():
            level = "approximation" if name == f"aa{self.levels}" else f"level {Subband.named(name).level}"
            sums[level] = sums.get(level, 0.0) + share
        return sums

    def as_dict(self) -> dict[str, Any]:
        """Give all fields and properties as plain values, for JSON."""
        return {
            **dataclasses.asdict(self),
            "rank": self.rank,
            "lora_parameters": self.lora_parameters,
            "energy_shares": self.energy_shares(),
            "level_shares": self.level_shares(),
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw heatmaps of modules × subbands into an image file: the ranks, and the shares of each module's energy.

        The file appears, or replaces an old one, only when it is complete.

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
    """Compute ‖B_s A_s‖² = ⟨B_sᵀ B_s, A_s A_sᵀ⟩ from two r × r matrices, so that the product B_s A_s is never built.

    For a stack of experts it is the sum over all of them.
    """
    rows, columns = rows.double(), columns.double()
    # Columns with a third axis belong to experts. Other rows may be kernels of a convolution, (r, n, *kernel).
    if columns.ndim == 2:
        rows = rows.flatten(1)
    return float(((columns.mT @ columns) * (rows @ rows.mT)).sum())


def _shares(sums: dict[str, float]) -> dict[str, float]:
    total = sum(sums.values())
    return {name: value / total if total > 0 else 0.0 for name, value in sums.items()}
