"""WaRA beside bare parameters, such as the weights of experts or of PyTorch's attention.

Their module computes with them in its own forward, and there is no layer that could be replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..base_layers.kinds import BareParameter
from .base import WaRALayer
from .low_rank_update import ExpertsUpdate, LowRankUpdate
from .weight_stand_in import AdaptedWeight, Update

# Held while a forward puts weights in place or removes them, since several threads may call a module at once. It is no
# attribute of the modules, for a lock can be neither copied nor pickled.
_change = threading.Lock()


class ParameterLayer(WaRALayer):
    """The adapters of one bare parameter: ΔW_e = scaling · B̂_e Â_e for each expert e, or scaling · B̂ Â of a matrix.

    Â has the shape (experts, R, n) and B̂ (experts, m, R); one transform synthesises them for all experts. This layer
    computes no result itself. The `AdaptedModule` that holds it puts its `adapted_weight` in the parameter's place.
    """

    @property
    def bare(self) -> BareParameter:
        """The base layer: the parameter, presented as the weight of a layer."""
        return cast(BareParameter, self.get_base_layer())

    def adapted_weight(self, owner: nn.Module) -> AdaptedWeight | None:
        """Return the parameter with the active adapters' updates; None if no active adapter adapts it.

        Args:
            owner: the module that has the parameter, in this model or in a replica of it.
        """
        adapters = [adapter for adapter in self.active_adapters if adapter in self.wara_A]
        if self.disable_adapters or self.merged or not adapters:
            return None
        updates = tuple(self._update(adapter, self.bare.dtype) for adapter in adapters)
        # The result will shadow the parameter, so W is read from PyTorch's dict of parameters, once it is used.
        return AdaptedWeight(lambda: cast(Tensor, owner._parameters[self.bare.name]), updates, self.module_name)

    def _update(self, adapter: str, dtype: torch.dtype) -> Update:
        factor_a, factor_b = (factor().to(dtype) for factor in self.factors(adapter))  # (E, R, n), (E, m, R)
        dropout = self.wara_dropout[adapter]
        if self.kind.keeps_in_first:
            return Update(factor_a.mT, factor_b.mT * self.scaling[adapter], dropout)
        return Update(factor_b, factor_a * self.scaling[adapter], dropout)

    def weight_place(self) -> tuple[nn.Module, str]:
        return self.bare.owner, self.bare.name

    def _check_weight(self) -> None:
        if is_parametrized(self.bare.owner, self.bare.name):
            raise ValueError(
                f"Cannot merge: parameter {self.module_name!r} is parametrized, as quantized experts are, and has no "
                "weight to merge into. Load the model without quantization or parametrizations, and merge the saved "
                "adapter into that."
            )

    def _add_to_base_weight(self, updates: list[LowRankUpdate], to_check: Sequence[str] = ()) -> None:
        """Add ΔW to one expert after the other, so that ΔW of all experts is never in memory at once."""
        weight = self.get_base_weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        merged = torch.empty_like(weight)
        experts = range(len(weight)) if self.kind.has_experts else [None]
        for expert in experts:
            own = slice(None) if expert is None else expert
            total = weight[own].to(dtype, copy=True)
            for update in updates:
                total.add_(_of_expert(update, expert).to(total.device).dense(dtype))
            merged[own] = total.to(weight.dtype)
        if to_check and not torch.isfinite(merged).all():
            raise self._not_finite(to_check)
        self.set_base_weight(merged)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        """Keep PyTorch's Transformer layers off their fused kernel, which they skip for objects with this method."""
        return NotImplemented

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse to be called.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"{self.module_name!r} is a parameter; its module computes with it, and is what to call.")


class _Adapted(nn.Module):
    """The last parametrization of a parametrized weight. It puts the updates beside what the others make."""

    def __init__(self, weight: AdaptedWeight) -> None:
        super().__init__()
        self.adapted = weight

    def forward(self, weight: Tensor) -> AdaptedWeight:
        return AdaptedWeight(lambda: weight, self.adapted.updates, self.adapted.name)


def _of_expert(update: LowRankUpdate, expert: int | None) -> LowRankUpdate:
    return update if expert is None else cast(ExpertsUpdate, update).of_expert(expert)


class AdaptedModule(nn.Module):
    """Takes the place of a module of which bare parameters are adapted.

    Its children are the module itself, `base_layer`, and a `ParameterLayer` for each adapted parameter, of the
    parameter's name. The weight of `nn.MultiheadAttention`'s output projection lies in another module, so its layer
    has that module's name. During a forward, the module finds an `AdaptedWeight` where it looks for the parameter, and
    computes as it always does. For the experts of transformers this works in every implementation that multiplies by
    the weights ("grouped_mm", "batched_mm", "eager"). Neither ΔW nor W + ΔW of any expert is built.

    Args:
        base_layer: the module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self._inside = 0  # forwards that are under way, in all threads

    @property
    def layers(self) -> dict[str, ParameterLayer]:
        """The adapter layers, by the parameter's name."""
        return {name: child for name, child in self.named_children() if isinstance(child, ParameterLayer)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's result with its adapted parameters, outside of the graphs of torch.compile."""
        # A graph could not hold `AdaptedWeight`, which is no tensor, nor the change of the module's attributes.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._forward)(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self.layers.values():
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
        places: list[tuple[nn.Module, str, AdaptedWeight]] = []
        for layer in self.layers.values():
            owner = self.base_layer.get_submodule(layer.bare.inside)
            weight = layer.adapted_weight(owner)
            if weight is not None:
                places.append((owner, layer.bare.name, weight))
        with self._in_place(places):
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _in_place(self, places: list[tuple[nn.Module, str, AdaptedWeight]]) -> Iterator[None]:
        """Scope in which modules find these weights in place of their parameters.

        Python finds a plain attribute before PyTorch looks for a parameter. Of several parametrizations the last one
        gives the weight. Forwards in several threads at once have the same adapters. So later ones use the weights
        that the first has put there, and the last one to end removes them.
        """
        if not places:
            yield
            return
        with _change:
            self._inside += 1
            for owner, name, weight in places:
                if not is_parametrized(owner, name):
                    vars(owner).setdefault(name, weight)
                elif self._inside == 1:
                    owner.parametrizations[name].append(_Adapted(weight))  # type: ignore[union-attr, index]
        try:
            yield
        finally:
            with _change:
                self._inside -= 1
                if not self._inside:
                    for owner, name, _ in places:
                        if is_parametrized(owner, name):
                            owner.parametrizations[name].pop(-1)  # type: ignore[union-attr, index]
                        vars(owner).pop(name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedModule:
        """Move or cast the parameters. They belong to the module, so the layers that adapt them have to be told."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                stack.enter_context(layer.following_casts(fn))
            return cast(AdaptedModule, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module itself, with the adapters merged if `merge`; PEFT calls this to unload."""
        if merge:
            for layer in self.layers.values():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        """Answer for the module, since others read attributes off it, such as a router's `e_score_correction_bias`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # a copy that is being made has none yet, and would ask itself for ever
                raise
            return getattr(self.base_layer, name)
