"""Turns the ΔW of one module into PEFT's LoRA parameters, exact or truncated, at the rank that all modules share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_algebra.truncation import rank_for_energy, truncation_energy
from .low_rank_update import LowRankUpdate


@dataclass(frozen=True)
class LoraModule:
    """Holds a module's part of a LoRA, at the module's own rank.

    Attributes:
        name: name of the adapted module.
        update: its ΔW.
        pairs: factors (rank, n · kernel) and (m / groups, rank). There is one pair for each group of a convolution or
            for each expert, and one pair for other modules.
        lost, whole: ‖ΔW − B A‖² and ‖ΔW‖². If the factors are exact, both are zero: `whole` is not computed then.
    """

    name: str
    update: LowRankUpdate
    pairs: list[tuple[Tensor, Tensor]]
    lost: float = 0.0
    whole: float = 0.0

    @classmethod
    def of(cls, name: str, update: LowRankUpdate, rank: int | float | None) -> LoraModule:
        """Make a module's part: exact if `rank` is None, else the best approximation of ΔW.

        An int is the rank to truncate to. A float is the share of ΔW's energy that the least sufficient rank keeps.

        Raises:
            ValueError: ΔW is not finite, or groups cannot share the rank.
        """
        for factor in (update.factor_a, update.factor_b):
            _check_finite(name, factor, "its alpha, or the adapter, is too large")
        if rank is None:
            return cls(name, update, update.pairs())
        if isinstance(rank, int) and rank % update.groups:
            raise ValueError(
                f"rank={rank!r} must be a multiple of the {update.groups} groups of the convolution {name!r}."
            )
        parts = update.decomposition()
        whole = max(len(part.values) for part in parts)  # a larger rank would only add zeros
        kept = rank_for_energy(parts, rank) if isinstance(rank, float) else min(rank // update.groups, whole)
        return cls(name, update, [part.truncated(kept) for part in parts], *truncation_energy(parts, kept))

    @property
    def rank(self) -> int:
        """The rank that PEFT's LoRA needs for this module: the groups of a convolution share it."""
        return len(self.pairs[0][0]) * self.update.groups

    def tensors(self, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Make PEFT's LoRA parameters of this module, filled up with zeros to that rank.

        In a grouped convolution, LoRA's A sees all in channels and its B is grouped. So each group gets its share of
        the rank, and its rows of A are zero on the other groups' channels. For experts, LoRA's A has the shape
        (experts · rank, n) and its B the shape (m, rank · experts).

        Raises:
            ValueError: a value is too large for `dtype`.
        """
        update = self.update
        share, channels = rank // update.groups, self.pairs[0][0].shape[1] // math.prod(update.kernel)
        padded_a, padded_b = [], []
        for group, (factor_a, factor_b) in enumerate(self.pairs):
            missing = share - len(factor_a)
            rows = F.pad(factor_a, (0, 0, 0, missing)).view(share, channels, *update.kernel)
            before = 0 if update.kind.has_experts else group * channels
            around = (before, (update.groups - 1) * channels - before)
            padded_a.append(F.pad(rows, (*(0 for _ in update.kernel for _ in range(2)), *around)))
            padded_b.append(F.pad(factor_b, (0, missing)))
        lora_a, lora_b = torch.cat(padded_a), torch.cat(padded_b)
        if update.kind.has_experts:  # LoRA's B has the first column of every expert, then every second one, …
            lora_b = torch.stack(padded_b, dim=2).flatten(1)
        name_a, name_b = update.kind.lora_names
        named = {name_a: lora_a, name_b: lora_b.view(*lora_b.shape, *(1 for _ in update.kernel))}
        rounded = {key: value.to(update.factor_a.device, dtype).contiguous() for key, value in named.items()}
        for value in rounded.values():
            _check_finite(self.name, value, "export it in a wider dtype")
        return rounded


def common_rank(modules: Iterable[tuple[int, int]]) -> int:
    """Find the rank of a LoRA whose modules have these (rank, groups).

    It is the least that is no smaller than any rank and a multiple of every number of groups.
    """
    pairs = list(modules)
    step = math.lcm(*(groups for _, groups in pairs))
    return -(-max(rank for rank, _ in pairs) // step) * step


def _check_finite(name: str, tensor: Tensor, remedy: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"ΔW of module {name!r} has values that are not finite in {tensor.dtype}: {remedy}.")
