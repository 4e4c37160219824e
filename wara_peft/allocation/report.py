"""The report of `allocate_ranks`: ranks and energy by module and subband, as a table and as a picture."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from ..inspection.heatmaps import draw_heatmaps
from ..wavelet import subbands


@dataclass(frozen=True)
class ModuleAllocation:
    """The ranks that one target module got, and the scores that led to them.

    Attributes:
        name, out_features, in_features: the module's name and shape.
        ranks: the rank of each subband that could have one.
        energy: for each of these subbands the sum of the scores of all its directions.
        parameters: how many numbers are trained for the module.
    """

    name: str
    out_features: int
    in_features: int
    ranks: dict[str, int]
    energy: dict[str, float]
    parameters: int


@dataclass(frozen=True)
class AllocationReport:
    """How `allocate_ranks` has spent a budget.

    Attributes:
        score: "gradient" or "activation", as in `allocate_ranks`.
        budget: how many parameters there were to spend.
        wavelet, levels: the config's fields.
        modules: all target modules, also those without any rank, which get no adapter.
    """

    score: str
    budget: int
    wavelet: str
    levels: int
    modules: list[ModuleAllocation]

    @property
    def parameters(self) -> int:
        """Number of parameters of the adapter, which is at most the budget."""
        return sum(module.parameters for module in self.modules)

    @property
    def subbands(self) -> list[str]:
        """Names of the subbands that could have a rank, coarsest level first."""
        used = {name for module in self.modules for name in module.ranks}
        return [band.name for band in subbands(self.levels) if band.name in used]

    def energy_shares(self) -> dict[str, dict[str, float]]:
        """Give, for each module by name, each of its subbands' share of the energy of all modules together."""
        total = sum(sum(module.energy.values()) for module in self.modules)
        return {
            module.name: {name: energy / total if total > 0 else 0.0 for name, energy in module.energy.items()}
            for module in self.modules
        }

    def table(self) -> str:
        """Write a table with one row per module: rank and share of the energy by subband, and the parameters."""
        shares = self.energy_shares()
        rows = [["module", "out x in", *self.subbands, "parameters"]]
        for module in self.modules:
            cells = [
                f"{module.ranks[name]} ({shares[module.name][name]:.1%})" if name in module.ranks else ""
                for name in self.subbands
            ]
            shape = f"{module.out_features} x {module.in_features}"
            rows.append([module.name, shape, *cells, f"{module.parameters:,}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        last = f"{self.parameters:,} of {self.budget:,} parameters; rank (share of the energy) by {self.score}"
        return "\n".join([*(line.rstrip() for line in lines), last])

    __str__ = table

    def as_dict(self) -> dict[str, Any]:
        """Give all fields and properties as plain values, for JSON."""
        return {**dataclasses.asdict(self), "parameters": self.parameters, "energy_shares": self.energy_shares()}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw heatmaps of modules × subbands into an image file: the ranks, and the shares of the whole energy.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: matplotlib does not know the ending of the file's name.
        """
        names, shares = self.subbands, self.energy_shares()
        draw_heatmaps(
            path,
            f"{self.parameters:,} of {self.budget:,} parameters, {self.wavelet}, levels={self.levels}",
            [module.name for module in self.modules],
            names,
            {
                "Rank": [[module.ranks.get(name, 0) for name in names] for module in self.modules],
                f"Share of the energy ({self.score})": [
                    [shares[module.name].get(name, 0.0) for name in names] for module in self.modules
                ],
            },
        )
