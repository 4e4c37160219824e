"""What a form is: one class that says how an adapter's parts are made, saved, put together and combined."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..base_layers.kinds import ModuleShape
from ..base_layers.refusals import Refusal
from ..messages import first_few
from ..wavelet import Subband, max_useful_level, subbands
from .experts import ExpertsFactor
from .factors import SubbandFactor

Parts = Mapping[str, Any]
"""An adapter's parts in one module, by the name of the layer's container that holds them: `wara_A`, `wara_B`, …"""


class Settings(Protocol):
    """The fields of `WaRAConfig` that forms read."""

    wavelet: str
    levels: int
    task_type: Any
    init_weights: Any
    subband_ranks: dict[str, int] | None
    module_shapes: dict[str, list[Any]] | None
    grid_pairs: Any
    grid_size: tuple[int, int] | None
    num_prefix_tokens: int | None
    core: Any
    save_basis: bool
    base_weight_hashes: dict[str, str] | None

    def ranks_of(self, module_name: str) -> dict[str, int]: ...


@dataclass(frozen=True)
class Target:
    """A module that is about to be adapted.

    Attributes:
        shape: its shape.
        weight: gives its weight, (m, n), dequantized.
    """

    shape: ModuleShape
    weight: Callable[[], Tensor]


class Form:
    """What all forms share. A form has no state: what belongs to an adapter is in its config and its parts.

    Attributes:
        name: the form's name in the config.
        own_fields: fields of the config that have a meaning in this form alone.
        linear_only: whether it adapts linear layers alone.
        adapts_parameters: whether it adapts bare parameters, such as the weights of experts.
        factors_are_parts: whether the parts `wara_A` and `wara_B` are what hands out Â and B̂, as they stand.
        has_delta_weight: whether the adapter is a change of the layer's weight.
        initialisations: values of `init_weights` beside True and False.
        keeps_subbands: whether adapters of equal wavelet and levels combine within their subbands.
        not_combined: why some combination types do not work, by type.
    """

    name: str
    own_fields: tuple[str, ...] = ()
    linear_only = False
    adapts_parameters = False
    factors_are_parts = True
    has_delta_weight = True
    initialisations: tuple[str, ...] = ()
    keeps_subbands = False
    not_combined: ClassVar[Mapping[str, str]] = {}

    # The config.

    def check(self, settings: Settings) -> None:
        """Refuse fields of a config that contradict each other.

        Raises:
            ValueError: they do.
        """

    def single_pair(self, settings: Settings) -> str | None:
        """The setting by which one pair serves all subbands, so that they have one rank; None where there is none."""
        return None

    def subbands(self, settings: Settings) -> tuple[Subband, ...]:
        """All subbands that may have a rank, in the order of their ranks."""
        return subbands(settings.levels)

    def ranks(self, settings: Settings, rank: int, chosen: Mapping[str, int]) -> dict[str, int]:
        """The rank of each subband: `chosen`, or else `rank`, or 0 for the undecomposed matrix."""
        return {band.name: rank if band.level else 0 for band in self.subbands(settings)} | dict(chosen)

    def total_rank(self, settings: Settings, ranks: Mapping[str, int]) -> int:
        """R, the number of channels between A and B."""
        return sum(ranks.values())

    # The modules that it is to adapt.

    def unsuitable(
        self, settings: Settings, model: nn.Module, shapes: Mapping[str, ModuleShape]
    ) -> dict[str, Refusal]:
        """Why this form cannot adapt some of these modules, by name.

        Args:
            settings: the config.
            model: the model.
            shapes: of the modules, by name.
        """
        return {}

    def check_targets(self, settings: Settings, model: nn.Module, targets: Mapping[str, Target]) -> None:
        """Check all targets before the first is replaced, and warn of what will work but badly.

        Args:
            settings: the config.
            model: the model.
            targets: by name.

        Raises:
            ValueError: a target cannot be adapted.
        """
        lengths = {
            name: dict(zip(("out", "in"), target.shape.lengths, strict=True)) for name, target in targets.items()
        }
        warn_about_levels(settings, lengths)
        _warn_about_two_outputs(targets)

    def base_weight_hashes(self, settings: Settings, targets: Mapping[str, Target]) -> dict[str, str] | None:
        """Hashes, by name, of base weights from which a saved adapter makes its basis again; None if it does not."""
        return None

    def context(self, settings: Settings, model: nn.Module, module_name: str) -> Any:
        """What `create` has to know of the model around a module."""
        return None

    # An adapter's parts.

    def create(
        self, settings: Settings, module_name: str, shape: ModuleShape, ranks: Mapping[str, int], context: Any = None
    ) -> Parts:
        """The parts of a new adapter, without values.

        Args:
            settings: the config.
            module_name: the module, for errors.
            shape: its shape.
            ranks: the rank of each subband.
            context: what `context` has found, or None outside of a model.
        """
        raise NotImplementedError

    def initialise(self, parts: Parts, init_weights: bool | str) -> None:
        """Draw A_s as LoRA draws A, with fan-in n_j, and set B_s to zero, or draw it too if `init_weights` is False.

        Then ‖row of Â‖² is about 1/3, as in LoRA, and ΔW = 0.
        """
        for rows in _to_fill(parts["wara_A"]):
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
        for columns in _to_fill(parts["wara_B"]):
            if init_weights:
                nn.init.zeros_(columns)
            else:
                nn.init.kaiming_uniform_(columns, a=math.sqrt(5))

    def may_be_loaded(self, parts: Parts) -> bool:
        """Whether values that come from the base layer's weight may still come from the file of a saved adapter."""
        return False

    def needs_weight(self, parts: Parts) -> bool:
        """Whether values have to be made from the base layer's weight."""
        return False

    def fill(self, parts: Parts, module_name: str, shape: ModuleShape, weight: Tensor) -> None:
        """Make them, from the weight, (m, n).

        Raises:
            ValueError: it is not there, or not finite.
        """

    def factors(self, parts: Parts) -> tuple[SubbandFactor, SubbandFactor]:
        """The modules that hand out Â, (R, n), and B̂, (m, R)."""
        return parts["wara_A"], parts["wara_B"]

    def between(self, hidden: Tensor, parts: Parts) -> Tensor:
        """What happens to x Âᵀ, (..., R), before it meets B̂, in forms without ΔW."""
        raise NotImplementedError

    @torch.no_grad()
    def coefficients(self, parts: Parts) -> dict[str, tuple[Tensor, Tensor]]:
        """A_s, (r_s, n_j, *kernel), and B_s, (m_j, r_s), of each subband with a rank; without the scaling."""
        factor_a, factor_b = self.factors(parts)
        return {name: (factor_a.subband(name), factor_b.subband(name)) for name in factor_a.subbands}

    def saved(self, parts: Parts) -> dict[str, Tensor]:
        """The tensors that a saved adapter has of these parts, by key, without module and adapter.

        What trains is an `nn.Parameter`.
        """
        tensors: dict[str, Tensor] = {}
        for container, part in parts.items():
            if isinstance(part, nn.Parameter):
                tensors[container] = part
            elif isinstance(part, nn.Module):
                state = part.state_dict(keep_vars=True)
                tensors |= {f"{container}.{name}": tensor for name, tensor in state.items()}
        return tensors

    def with_values(self, parts: Parts, tensors: Mapping[str, Tensor]) -> Parts:
        """The parts with other tensors, which have the keys and shapes of `saved`."""
        for container, part in parts.items():
            if isinstance(part, nn.Module):
                own = {name: tensors[f"{container}.{name}"] for name in part.state_dict()}
                part.load_state_dict(own, assign=True)
        bare = {name: nn.Parameter(tensors[name]) for name, part in parts.items() if isinstance(part, nn.Parameter)}
        return {**parts, **bare}


def _to_fill(factor: nn.Module) -> list[Tensor]:
    """The values of a factor's parameters, to be drawn in place: those of all experts as rows of one matrix."""
    values = [parameter.detach() for parameter in factor.parameters()]
    return [value.flatten(0, 1) for value in values] if isinstance(factor, ExpertsFactor) else values


def warn_about_levels(settings: Settings, axes: Mapping[str, Mapping[str, int]]) -> None:
    """Warn, once, of axes on which filters wrap around.

    Args:
        settings: the config.
        axes: lengths of the axes that are transformed, by module and by the axis's name.
    """
    too_many = []
    for name, lengths in axes.items():
        for axis, length in lengths.items():
            useful = max_useful_level(settings.wavelet, length)
            if settings.levels > useful:
                too_many.append(f"{name!r} ({axis} axis of length {length}: at most {useful})")
    if too_many:
        warnings.warn(
            f"levels={settings.levels} is more than is useful for wavelet={settings.wavelet!r} in "
            f"{first_few(too_many)}: filters wrap around the axis. The transform stays exact, but "
            "coarse subbands carry little more."
        )


def _warn_about_two_outputs(targets: Mapping[str, Target]) -> None:
    heads = [repr(name) for name, target in targets.items() if target.shape.out_features == 2]
    if heads:
        warnings.warn(
            f"Module {first_few(heads)} has two outputs. The gradients of two logits cancel, so the approximation "
            "band of its out axis gets none and half of the adapter does not learn. If it is a classification head, "
            "train it in full: put it in `modules_to_save`."
        )
