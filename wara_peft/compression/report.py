"""What compressing did to each layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Factorization:
    """What `factorize`, or another function that replaces layers at a rank, did to a model.

    Attributes:
        replaced: rank of each layer that was factorised, by its name.
        left: why a target was left as it is, by its name.
        parameters_before, parameters_after: of the whole model, shared ones counted once.
    """

    replaced: dict[str, int]
    left: dict[str, str]
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class LayerReport:
    """One target.

    Attributes:
        name: the layer's.
        shape: (m, n).
        rank: of the low-rank layer, or the number of atoms of a dictionary; None is dense.
        nonzeros: values in each row of a dictionary's coefficients, None where there is no dictionary.
        parameters_before, parameters_after: of the layer, biases included; the places of a dictionary's values count
            by their bytes.
        lost: the solver's error as a share of that of an output of zero; 0 for a dense layer.
        reason: why it is dense, or "".
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    nonzeros: int | None
    parameters_before: int
    parameters_after: int
    lost: float
    reason: str = ""


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Attributes:
        solver, allocation: how.
        budget: the most that the targets could cost, in `unit`.
        unit: "parameters", "bytes", "flops", or "cost" for costs of one's own.
        spent, before: what the targets cost now, and what they cost before.
        layers: the targets.
        left: why a layer that was asked for is no target, by its name; it does not count.
        sequential: whether statistics were taken anew after the layers before had been compressed.
    """

    solver: str
    allocation: str
    budget: float
    unit: str
    spent: float
    before: float
    layers: list[LayerReport]
    left: dict[str, str]
    sequential: bool = False

    @property
    def parameters_before(self) -> int:
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        return sum(layer.parameters_after for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Everything here as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CompressionReport:
        """What `as_dict` gave, also after JSON.

        Raises:
            TypeError, KeyError: it is something else.
        """
        layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in fields["layers"]]
        return cls(**{**fields, "layers": layers})

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [
            f"{layer.name:<{width}}  {layer.shape[0]:>6} x {layer.shape[1]:<6} "
            f"{'dense' if layer.rank is None else layer.rank:>6}  "
            f"{layer.parameters_after:>12,} of {layer.parameters_before:>12,}  lost {layer.lost:.2%}"
            for layer in self.layers
        ]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """All layers together, in a line."""
        dense = sum(layer.rank is None for layer in self.layers)
        share = self.parameters_after / max(self.parameters_before, 1)
        return (
            f"{len(self.layers)} layers by solver={self.solver!r} and allocation={self.allocation!r}: "
            f"{self.parameters_after:,} of {self.parameters_before:,} parameters ({share:.1%}), {dense} left dense; "
            f"{self.spent:,.12g} of a budget of {self.budget:,.12g} {self.unit}."
        )
