"""`form="grid"`: each subband of a vision model's patch tokens has its own pair of factors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base_layers.kinds import ModuleShape
from ..base_layers.refusals import Refusal
from ..messages import first_few
from ..wavelet import Subband
from .base import Form, Parts, Settings, Target, warn_about_levels
from .factors import IN_DIM, OUT_DIM
from .token_grid import TokenGrid, check_prefix, known_size, reasons_off_grid, token_grid
from .token_mixing import TokenMixing, grid_subbands

_NOT_COMBINED = (
    "it has form='grid', and mixes tokens. Several such adapters can be active at once: "
    "`model.base_model.set_adapter([...])`."
)


class GridFactor(nn.Module):
    """One side of the pairs of all subbands: A, (R, n), with `dim=1`, or B, (m, R), with `dim=0`, in one parameter.

    It has no wavelet of its own: this form transforms tokens, and not features.

    Args:
        length: n or m.
        ranks: rank of each subband by name, in the order of `grid_subbands`; subbands of rank 0 may be left out.
        dim: 1 for A, 0 for B.
        shared: whether one pair serves all subbands. Their ranks are then equal, and R is the rank of one of them.
    """

    def __init__(self, length: int, ranks: Mapping[str, int], dim: int, shared: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.ranks = {name: rank for name, rank in ranks.items() if rank}
        self.rank = next(iter(self.ranks.values())) if shared else sum(self.ranks.values())
        self.weight = nn.Parameter(torch.empty((self.rank, length) if dim == IN_DIM else (length, self.rank)))

    @property
    def subbands(self) -> tuple[str, ...]:
        """Names of the subbands that have a rank, in the order of their blocks."""
        return tuple(self.ranks)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"R={self.rank}, " + ", ".join(f"{name}={rank}" for name, rank in self.ranks.items())


class GridForm(Form):
    """result = base(x) + scaling · Σ_s B_s P_s(A_s x). P_s takes the subband s of the tokens on their grid of patches.

    P_s mixes tokens, so no change ΔW of the weight computes the same.
    """

    name = "grid"
    own_fields = ("grid_pairs", "grid_size", "num_prefix_tokens")
    linear_only = True
    has_delta_weight = False
    not_combined: ClassVar[Mapping[str, str]] = {"cat": _NOT_COMBINED, "linear": _NOT_COMBINED}

    def check(self, settings: Settings) -> None:
        if settings.num_prefix_tokens is not None and settings.num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens={settings.num_prefix_tokens!r} must be at least 0.")
        if settings.grid_size is not None and min(settings.grid_size) < 1:
            raise ValueError(f"grid_size={settings.grid_size!r} must be (rows, columns) of patches, each at least 1.")
        if settings.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            raise ValueError(
                f"form='grid' is for vision models, not for task_type={settings.task_type!r}: a wavelet over time "
                "would leak the future. Use form='subband'."
            )

    def single_pair(self, settings: Settings) -> str | None:
        return "grid_pairs='shared'" if settings.grid_pairs == "shared" else None

    def subbands(self, settings: Settings) -> tuple[Subband, ...]:
        return grid_subbands(settings.levels)

    def total_rank(self, settings: Settings, ranks: Mapping[str, int]) -> int:
        return next(iter(ranks.values())) if self.single_pair(settings) else sum(ranks.values())

    def unsuitable(
        self, settings: Settings, model: nn.Module, shapes: Mapping[str, ModuleShape]
    ) -> dict[str, Refusal]:
        """The modules whose tokens lie on no grid, each with the reason."""
        return reasons_off_grid(model, shapes)

    def check_targets(self, settings: Settings, model: nn.Module, targets: Mapping[str, Target]) -> None:
        if settings.module_shapes is None:  # not so for a saved adapter: it was trained with its `num_prefix_tokens`
            check_prefix(model, targets, settings)
        known = {name: known_size(model, name, settings) for name in targets}
        sizes = {name: size for name, size in known.items() if size is not None}
        collapsed = [repr(name) for name, size in sizes.items() if size == (1, 1)]
        if collapsed:
            warnings.warn(
                f"A grid of a single patch, in module {first_few(collapsed)}, makes form='grid' a plain LoRA of the "
                "coarsest subband's rank: the other subbands are zero. Use form='subband'."
            )
        axes = {name: {"row": size[0], "column": size[1]} for name, size in sizes.items() if size != (1, 1)}
        warn_about_levels(settings, axes)

    def context(self, settings: Settings, model: nn.Module, module_name: str) -> TokenGrid:
        return token_grid(model, module_name, settings)

    def create(
        self, settings: Settings, module_name: str, shape: ModuleShape, ranks: Mapping[str, int], context: Any = None
    ) -> Parts:
        shared = self.single_pair(settings) is not None
        # Outside of a model only the config tells anything about the grid.
        grid = context or TokenGrid(
            settings.grid_size, settings.num_prefix_tokens, fixed=settings.grid_size is not None
        )
        channels = tuple(band for band in self.subbands(settings) for _ in range(ranks[band.name]))
        parts = {
            "wara_A": GridFactor(shape.in_features, ranks, IN_DIM, shared),
            "wara_B": GridFactor(shape.out_features, ranks, OUT_DIM, shared),
            "token_mixing": TokenMixing(module_name, grid, settings.wavelet, channels),
        }
        if shared:
            parts["wara_gain"] = nn.Parameter(torch.empty(len(ranks), self.total_rank(settings, ranks)))
        return parts

    def initialise(self, parts: Parts, init_weights: bool | str) -> None:
        """Draw A and B as other forms do, and set gains to one."""
        super().initialise(parts, init_weights)
        if "wara_gain" in parts:
            nn.init.ones_(parts["wara_gain"])

    def mix_tokens(self, hidden: Tensor, parts: Parts) -> Tensor:
        result: Tensor = parts["token_mixing"](hidden, parts.get("wara_gain"))
        return result

    @torch.no_grad()
    def coefficients(self, parts: Parts) -> dict[str, tuple[Tensor, Tensor]]:
        """A_s and B_s of each subband. If all share a pair, the gain of a subband is multiplied into its B_s."""
        factor_a, factor_b = parts["wara_A"], parts["wara_B"]
        if "wara_gain" in parts:
            gains = zip(factor_a.ranks, parts["wara_gain"], strict=True)
            return {name: (factor_a.weight, factor_b.weight * gain) for name, gain in gains}
        ranks = list(factor_a.ranks.values())
        pairs = zip(factor_a.weight.split(ranks), factor_b.weight.split(ranks, 1), strict=True)
        return dict(zip(factor_a.ranks, pairs, strict=True))
