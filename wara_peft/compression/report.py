"""Reports of what compression did to each layer of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Factorization:
    """Result of `factorize` and of other functions that replace layers at a given rank.

    Attributes:
        replaced: maps the name of each factorised layer to its rank.
        left: maps the name of each target that stayed as it is to the reason.
        parameters_before, parameters_after: parameters of the whole model; a shared parameter counts once.
    """

    replaced: dict[str, int]
    left: dict[str, str]
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class LayerReport:
    """What `compress` did to one of its target layers.

    Attributes:
        name: full name of the layer.
        shape: (m, n), output and input features.
        rank: rank of the low-rank layer, or number of atoms of the dictionary; None if the layer stayed dense.
        nonzeros: values in each row of a dictionary's coefficients; None if there is no dictionary.
        parameters_before, parameters_after: parameters of the layer with its bias. The bits that say where a
            dictionary's values lie count too, converted from bytes to parameters.
        lost: error of the factorised layer, divided by the error of a layer that outputs zero; 0 for a dense layer.
        reason: why the layer stayed dense, or "".
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
class Evaluation:
    """What a model could do before and after `compress`.

    Attributes:
        metric: "perplexity" of a language model, or "accuracy" of a classifier, a share.
        before, after: the values.
    """

    metric: str
    before: float
    after: float

    def __str__(self) -> str:
        shown = ".2%" if self.metric == "accuracy" else ",.4g"
        return f"{self.metric}: {self.before:{shown}} before, {self.after:{shown}} after."


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did to a model.

    Attributes:
        solver, allocation: the arguments of `compress`; allocation is "given" if the caller gave all ranks.
        budget: the most that the targets were allowed to cost, in `unit`.
        unit: "parameters", "bytes", "flops", or "cost" if the caller gave a cost function.
        spent, before: what the targets cost now, and what they cost before.
        layers: one entry for each target.
        left: maps the name of each layer that was asked for, but could not be a target, to the reason. These layers
            count neither in `before` nor in `spent`.
        sequential: whether each layer's statistics were taken again after the layers before it had been compressed.
        evaluation: what the model could do before and after, if that was measured.
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
    evaluation: Evaluation | None = None

    @property
    def parameters_before(self) -> int:
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        return sum(layer.parameters_after for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Give all fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CompressionReport:
        """Make a report of the result of `as_dict`, which may have gone through JSON in between.

        Raises:
            TypeError, KeyError: `fields` is not a result of `as_dict`.
        """
        # JSON has no tuples: a shape comes back as a list.
        layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in fields["layers"]]
        evaluation = fields.get("evaluation")
        return cls(
            **{**fields, "layers": layers, "evaluation": None if evaluation is None else Evaluation(**evaluation)}
        )

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
        """One line about all layers together."""
        dense = sum(layer.rank is None for layer in self.layers)
        share = self.parameters_after / max(self.parameters_before, 1)
        return (
            f"{len(self.layers)} layers by solver={self.solver!r} and allocation={self.allocation!r}: "
            f"{self.parameters_after:,} of {self.parameters_before:,} parameters ({share:.1%}), {dense} left dense; "
            f"{self.spent:,.12g} of a budget of {self.budget:,.12g} {self.unit}."
        )
