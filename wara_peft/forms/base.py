"""The base class of forms, which says how an adapter's parts are made, saved, put together and combined."""

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
"""An adapter's parts in one module. The keys name the layer's containers that hold them: `wara_A`, `wara_B`, …"""


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
        shape: the module's shape.
        weight: returns the module's weight, (m, n), dequantized. It is a function, for most forms need no weight.
    """

    shape: ModuleShape
    weight: Callable[[], Tensor]


class Form:
    """Base class of all forms, with the behaviour that most of them share. A form has no state.

    All that belongs to an adapter is in its config and its parts.

    Attributes:
        name: the form's name in the config.
        own_fields: fields of the config that have a meaning only in this form.
        linear_only: whether it adapts only linear layers.
        adapts_parameters: whether it adapts bare parameters, such as the weights of experts.
        factors_are_parts: whether the parts `wara_A` and `wara_B` hand out Â and B̂, so that no layer asks `factors`.
        has_delta_weight: whether the adapter is a change of the layer's weight.
        initialisations: values that `init_weights` may have beside True and False.
        keeps_subbands: whether a combination of adapters with equal wavelet and levels has their subbands too.
        not_combined: the combination types that do not work, each with the reason.
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
            ValueError: two fields contradict each other.
        """

    def single_pair(self, settings: Settings) -> str | None:
        """The setting, in words, by which all subbands share one pair and one rank; None if each has its own."""
        return None

    def subbands(self, settings: Settings) -> tuple[Subband, ...]:
        """All subbands that may have a rank, in the order in which `ranks` lists them."""
        return subbands(settings.levels)

    def ranks(self, settings: Settings, rank: int, chosen: Mapping[str, int]) -> dict[str, int]:
        """The rank of each subband: that in `chosen`, or else `rank`, but 0 for the undecomposed matrix."""
        return {band.name: rank if band.level else 0 for band in self.subbands(settings)} | dict(chosen)

    def total_rank(self, settings: Settings, ranks: Mapping[str, int]) -> int:
        """R, the number of channels between A and B."""
        return sum(ranks.values())

    # The modules that an adapter is going to adapt.

    def unsuitable(
        self, settings: Settings, model: nn.Module, shapes: Mapping[str, ModuleShape]
    ) -> dict[str, Refusal]:
        """The modules that this form cannot adapt, by name, each with the reason.

        Args:
            settings: the config.
            model: the model.
            shapes: shapes of the modules that are asked about, by name.
        """
        return {}

    def check_targets(self, settings: Settings, model: nn.Module, targets: Mapping[str, Target]) -> None:
        """Check all targets before the first one is replaced. Warn about targets that would learn badly.

        Args:
            settings: the config.
            model: the model.
            targets: the modules, by name.

        Raises:
            ValueError: a target cannot be adapted.
        """
        lengths = {
            name: dict(zip(("out", "in"), target.shape.lengths, strict=True)) for name, target in targets.items()
        }
        warn_about_levels(settings, lengths)
        _warn_about_two_outputs(targets)

    def base_weight_hashes(self, settings: Settings, targets: Mapping[str, Target]) -> dict[str, str] | None:
        """Hashes of base weights by module, if a saved adapter makes its basis again from them; otherwise None."""
        return None

    def context(self, settings: Settings, model: nn.Module, module_name: str) -> Any:
        """Facts about the model around a module, in the form in which `create` takes them."""
        return None

    # An adapter's parts.

    def create(
        self, settings: Settings, module_name: str, shape: ModuleShape, ranks: Mapping[str, int], context: Any = None
    ) -> Parts:
        """The parts of a new adapter, without values.

        Args:
            settings: the config.
            module_name: name of the module, for errors.
            shape: the module's shape.
            ranks: the rank of each subband.
            context: the result of `context`, or None outside of a model.
        """
        raise NotImplementedError

    def initialise(self, parts: Parts, init_weights: bool | str) -> None:
        """Draw A_s as LoRA draws A, with fan-in n_j. Set B_s to zero, or draw it too if `init_weights` is False.

        The squared norm of a row of Â is then about 1/3, as in LoRA. With B_s = 0, ΔW = 0.
        """
        for rows in _to_fill(parts["wara_A"]):
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
        for columns in _to_fill(parts["wara_B"]):
            if init_weights:
                nn.init.zeros_(columns)
            else:
                nn.init.kaiming_uniform_(columns, a=math.sqrt(5))

    def may_be_loaded(self, parts: Parts) -> bool:
        """Whether a saved adapter's file may still bring the values that are made from the base layer's weight."""
        return False

    def needs_weight(self, parts: Parts) -> bool:
        """Whether some values of the parts are missing and have to be made from the base layer's weight."""
        return False

    def fill(self, parts: Parts, module_name: str, shape: ModuleShape, weight: Tensor) -> None:
        """Make the missing values of the parts from the base layer's weight, (m, n).

        Raises:
            ValueError: the weight is on the meta device, in parts elsewhere, or not finite.
        """

    def factors(self, parts: Parts) -> tuple[SubbandFactor, SubbandFactor]:
        """The modules that hand out Â, (R, n), and B̂, (m, R)."""
        return parts["wara_A"], parts["wara_B"]

    def mix_tokens(self, hidden: Tensor, parts: Parts) -> Tensor:
        """Change x Âᵀ, (..., R), before B̂ is applied. Forms without ΔW do this; others are not asked."""
        raise NotImplementedError

    @torch.no_grad()
    def coefficients(self, parts: Parts) -> dict[str, tuple[Tensor, Tensor]]:
        """A_s, (r_s, n_j, *kernel), and B_s, (m_j, r_s), of each subband with a rank; without the scaling."""
        factor_a, factor_b = self.factors(parts)
        return {name: (factor_a.subband(name), factor_b.subband(name)) for name in factor_a.subbands}

    def saved(self, parts: Parts) -> dict[str, Tensor]:
        """The tensors of these parts in a saved adapter. Keys have no module name and no adapter name in them.

        Tensors that train are `nn.Parameter`s.
        """
        tensors: dict[str, Tensor] = {}
        for container, part in parts.items():
            if isinstance(part, nn.Parameter):
                tensors[container] = part
            elif isinstance(part, nn.Module):
                state = part.state_dict(keep_vars=True)  # without `keep_vars` parameters would come as plain tensors
                tensors |= {f"{container}.{name}": tensor for name, tensor in state.items()}
        return tensors

    def with_values(self, parts: Parts, tensors: Mapping[str, Tensor]) -> Parts:
        """The parts with other values: `tensors` has the keys of `saved`, and replaces their tensors."""
        for container, part in parts.items():
            if isinstance(part, nn.Module):
                own = {name: tensors[f"{container}.{name}"] for name in part.state_dict()}
                # With `assign` the part takes the tensors themselves, and so their dtype and device.
                part.load_state_dict(own, assign=True)
        bare = {name: nn.Parameter(tensors[name]) for name, part in parts.items() if isinstance(part, nn.Parameter)}
        return {**parts, **bare}


def _to_fill(factor: nn.Module) -> list[Tensor]:
    """The values of a factor's parameters, to be drawn in place. Rows of all experts are one matrix."""
    # `nn.init` takes the fan-in from all dimensions but the first, and would count the experts' rows to it.
    values = [parameter.detach() for parameter in factor.parameters()]
    return [value.flatten(0, 1) for value in values] if isinstance(factor, ExpertsFactor) else values


def warn_about_levels(settings: Settings, axes: Mapping[str, Mapping[str, int]]) -> None:
    """Warn, in one warning, about axes on which filters wrap around.

    Args:
        settings: the config.
        axes: for each module the lengths of the axes that are transformed, by the axis's name.
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
