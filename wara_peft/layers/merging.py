"""`MergingLayer` merges ΔW into the weight of a base layer, and puts the weight back to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .kept_weight import KeptWeight, Seal
from .low_rank_update import LowRankUpdate
from .mergeable import check_mergeable


class MergingLayer(nn.Module, BaseTunerLayer):
    """Base class of adapter layers that merges and unmerges.

    From merge to unmerge it keeps the weight as it was before any adapter was merged, and each ΔW that was merged.
    From these it makes the weight with any of the merged adapters, so a ΔW need not be subtracted from a rounded sum.

    Attributes:
        module_name: the layer's full name in the model.
        tied_to: for each adapter that belongs to another layer, that layer. The two may share one weight.
        merged_adapters: names of the adapters that are merged.
    """

    module_name: str
    tied_to: Mapping[str, MergingLayer]
    wara_A: nn.ModuleDict
    merged_adapters: list[str]
    _kept: KeptWeight | None = None

    def check_has_delta_weight(self, adapter_names: Iterable[str]) -> None:
        """Refuse adapters whose change of the output no weight can make."""
        raise NotImplementedError

    def low_rank_update(self, adapter_name: str, dtype: torch.dtype | None = None) -> LowRankUpdate:
        """Return ΔW of an adapter as a pair of factors."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the ΔW of adapters to the base weight, in float32 or better and with one rounding.

        The weight without any adapter is kept, in main memory, until all adapters are unmerged: several adapters that
        are merged one after the other give the same weight as when they are merged together.

        Args:
            safe_merge: check that the merged weight is finite before it replaces the base weight.
            adapter_names: adapters to merge; None means the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite, an adapter has no ΔW, or something else wrote
                the base weight since adapters were merged into it; the base weight is untouched.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.wara_A]
        if not names:
            return
        self.check_mergeable(names)
        # Layers that share a weight would add the same ΔW twice.
        own = [name for name in names if not self._is_merged_by_source(name)]
        try:
            if own:
                updates = {name: self._update_to_merge(name) for name in own}
                self._rewrite({**(self._kept.updates if self._kept else {}), **updates}, safe_merge)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11 on
                error.add_note(f"This happened while merging into module {self.module_name!r}.")
            raise
        self.merged_adapters.extend(names)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Put the base weight back as it was before these adapters were merged into it, to the bit.

        Adapters that stay merged are part of the weight with the ΔW that they had when they were merged.

        Args:
            adapter_names: adapters to take out; None means all.

        Raises:
            ValueError: something else wrote the base weight since, or this layer is a copy of a merged one; nothing
                is changed.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        left = [] if adapter_names is None else [name for name in self.merged_adapters if name not in adapter_names]
        if any(name not in left for name in self._merged_here()):
            self._rewrite({name: update for name, update in self._kept_updates().items() if name in left})
        self.merged_adapters = left

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and take it out of the base weight if it is merged."""
        if adapter_name in self.merged_adapters:
            self.unmerge([adapter_name])
        super().delete_adapter(adapter_name)

    def check_mergeable(self, adapter_names: Iterable[str]) -> None:
        """Refuse to merge if the base layer with the merged weight would not compute what it does with the adapters.

        Raises:
            ValueError: an adapter has no ΔW, or the base layer's weight is computed or quantized, or the layer does
                more with it than multiply by it.
        """
        self.check_has_delta_weight(adapter_names)
        if self.quantization_backend is None:
            self._check_weight()

    def _check_weight(self) -> None:
        check_mergeable(self.module_name, self.get_base_layer())

    def weight_place(self) -> tuple[nn.Module, str]:
        """Return the module that has the base weight, and the weight's name there; HQQ calls it `W_q`."""
        base = self.get_base_layer()
        return base, "W_q" if hasattr(base, "W_q") else "weight"

    def _weights(self) -> list[Tensor]:
        """Return the tensors that merging writes."""
        owner, name = self.weight_place()
        return [getattr(owner, name).data]

    def _keep_weight(self) -> KeptWeight:
        """Keep the base layer's weight as it is now."""
        return KeptWeight(self)

    def _is_merged_by_source(self, adapter_name: str) -> bool:
        """Whether the layer whose adapter this one takes over merges it into the one weight of both."""
        source = self.tied_to.get(adapter_name)
        return source is not None and self.get_base_layer().weight is source.get_base_layer().weight

    def _merged_here(self) -> list[str]:
        """Return the merged adapters that this layer itself has added to its weight."""
        return [name for name in self.merged_adapters if not self._is_merged_by_source(name)]

    @torch.no_grad()
    def _update_to_merge(self, adapter_name: str) -> LowRankUpdate:
        weight = self._weights()[0]
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        return self.low_rank_update(adapter_name, torch.promote_types(dtype, torch.float32))

    def _kept_updates(self) -> dict[str, LowRankUpdate]:
        """Return the updates that are merged, by the adapter's name.

        Raises:
            ValueError: adapters are merged, and this layer has not kept their updates, since it is a copy.
        """
        if self._kept is not None:
            return self._kept.updates
        if self._merged_here():
            raise ValueError(
                f"Module {self.module_name!r} is a copy of one with merged adapters "
                f"({', '.join(self.merged_adapters)}), and only the original has kept the base weight as it was "
                "before. Unmerge the original before you copy or pickle it, call `merge_and_unload` on the copy, or "
                "load base model and adapter again."
            )
        return {}

    def check_not_written(self) -> bool:
        """Refuse to change merged adapters of a base weight that something else wrote since they were merged.

        Returns:
            Whether the weight is as merging left it. If not, an adapter layer inside of this one may have written it.

        Raises:
            ValueError: something else wrote the weight, or the layer is a copy of a merged one.
        """
        self._kept_updates()
        as_merged = self._is_as_merged()
        if not as_merged and not isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"The base weight of module {self.module_name!r} has been written since adapters were merged into it "
                f"({', '.join(self.merged_adapters)}), by a loaded state dict, in place, or by another adapter around "
                "the layer. To put the old weight back would lose that. Unmerge before you write it, and adapters "
                "that lie around each other in the reverse order of merging; now, load the base model again, or go "
                "on with the merged one: `merge_and_unload`."
            )
        return as_merged

    def _is_as_merged(self) -> bool:
        return self._kept is None or self._kept.seal is None or self._kept.seal.is_on(self._weights())

    @torch.no_grad()
    def _rewrite(self, updates: dict[str, LowRankUpdate], check_finite: bool = False) -> None:
        """Make the base weight what it was before any adapter was merged, plus these updates; all or nothing."""
        as_merged = self.check_not_written()
        kept, before = self._kept, self._keep_weight()  # `before` is for an error on the way
        new = [name for name in updates if kept is None or name not in kept.updates]
        try:
            if kept is not None and as_merged:
                kept.restore(self)
            elif kept is not None:
                # An adapter of another method was merged meanwhile. To restore would lose its change, so our own ΔW is
                # subtracted here, which rounds.
                self._add_to_base_weight([-update for update in kept.updates.values()])
                kept = self._keep_weight()
            if updates:
                self._add_to_base_weight(list(updates.values()), new if check_finite else [])
        except BaseException:
            before.restore(self)
            raise
        if not updates:
            self._kept = None
            return
        self._kept = kept or before
        self._kept.to_main_memory()
        self._kept.updates = {name: update.to("cpu", copy=True) for name, update in updates.items()}
        self._kept.seal = Seal(self._weights())

    def _add_to_base_weight(self, updates: list[LowRankUpdate], to_check: Sequence[str] = ()) -> None:
        """Replace the base weight by its sum with these updates, rounded once.

        Args:
            updates: the updates to add.
            to_check: names of the adapters that an error names if the sum is not finite. If empty, nothing is checked.
        """
        weight = self.get_base_weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(dtype, copy=True)
        for update in updates:
            total.add_(update.to(total.device).dense(dtype))
        merged = total.to(weight.dtype)
        if to_check and not torch.isfinite(merged).all():
            raise self._not_finite(to_check)
        self.set_base_weight(merged)

    def forget_kept_weight(self) -> None:
        """Drop the kept weight: from now on the merged one is the base layer's own, and cannot be unmerged."""
        self._kept = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergingLayer:
        # PyTorch calls this for `to`, `half`, `cuda` and the like.
        with self.following_casts(fn):
            return cast(MergingLayer, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    @contextmanager
    def following_casts(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Scope in which `change` may be applied to the base weight: if that casts it, the kept one is cast too.

        Then `unmerge` gives the weight that casting the unmerged model would have given. The seal is made again, since
        a cast is no write by somebody else.
        """
        with ExitStack() as stack:
            for source in self.tied_to.values():
                stack.enter_context(source.following_casts(change))
            kept = self._kept
            dtype = None if kept is None else self._weights()[0].dtype
            # A trial on an empty tensor shows whether `change` casts.
            if kept is None or change(torch.empty(0, dtype=dtype)).dtype == dtype:
                yield
                return
            as_merged = self._is_as_merged()
            yield
            kept.cast(self._weights()[0].dtype)
            if as_merged:
                kept.seal = Seal(self._weights())

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept weight out of copies and pickles, which would hold the base weight twice."""
        return {**self.__dict__, "_kept": None}

    def _not_finite(self, adapter_names: Iterable[str]) -> ValueError:
        return ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken "
            f"in module {self.module_name!r}. The base weight is unchanged; merge without this adapter, or load "
            "it again from a good checkpoint."
        )
