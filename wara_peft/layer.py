"""Adapter layers: a base layer, and beside it the factors Â and B̂ of each adapter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import WaRAConfig, scaling
from .factors import FACTORS, IN_DIM, OUT_DIM, SubbandFactor, TransposedFactor
from .grid import GridFactor, TokenGrid, TokenMixing, grid_subbands
from .low_rank_update import LowRankUpdate
from .tiny import base_weight, fill_from_weight, tiny_factors
from .wavelet import autocast_off

KINDS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
"""Classes of base layers whose name is their kind; everything else that is adapted is linear."""


class WaRALayer(nn.Module, BaseTunerLayer):
    """What all WaRA layers share: factors, scaling, forward and merging, by adapter name.

    Args:
        base_layer: the layer that is adapted.
        adapter_name: name of its first adapter.
        module_name: its full name in the model, by which configs give ranks and errors name it.
        config: that adapter's configuration.
        tied_to: the layer whose weight this layer's weight is tied to, and whose adapter it takes over.
        kwargs: what PEFT's quantization backends ask for.

    Attributes:
        wara_A, wara_B: for each adapter the module whose call gives Â (R, n) or B̂ (m, R).
        wara_gain: for adapters of `form="grid"` with a shared pair, the gains (3L + 1, r) of its subbands.
        wara_core, wara_basis: for adapters of `form="tiny"` what trains and what does not.
        token_mixing: for adapters of `form="grid"` what happens to tokens between A and B.
        wara_alpha, scaling: for each adapter the numerator of its scaling, and the scaling in use.
    """

    adapter_layer_names: tuple[str, ...] = ("wara_A", "wara_B", "wara_gain", "wara_core", "wara_basis")
    other_param_names: tuple[str, ...] = (
        "wara_alpha",
        "scaling",
        "use_rslora",
        "wara_dropout",
        "tied_to",
        "token_mixing",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        module_name: str,
        config: WaRAConfig,
        tied_to: WaRALayer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.wara_A = nn.ModuleDict({})
        self.wara_B = nn.ModuleDict({})
        self.wara_gain = nn.ParameterDict({})
        self.wara_core = nn.ModuleDict({})
        self.wara_basis = nn.ModuleDict({})
        self.wara_dropout = nn.ModuleDict({})
        self.wara_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.tied_to: dict[str, WaRALayer] = {}
        self.token_mixing: dict[str, TokenMixing] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        # The model has refused layers whose features are unknown.
        features = cast(tuple[int, int], _get_in_out_features(self.get_base_layer()))
        self.in_features, self.out_features = features
        self.update_layer(adapter_name, config, tied_to=tied_to)

    @property
    def kind(self) -> str:
        """What the base layer is, as recorded in `WaRAConfig.module_shapes`: the name of a supported class."""
        base_layer = self.get_base_layer()
        return next((cls.__name__ for cls in KINDS if isinstance(base_layer, cls)), "Linear")

    @property
    def in_length(self) -> int:
        """Length of the axis of Â that is transformed."""
        return self.in_features

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution; empty for other layers."""
        return ()

    def update_layer(self, adapter_name: str, config: WaRAConfig, tied_to: WaRALayer | None = None) -> None:
        """Add an adapter, initialised, on the device of the base layer.

        Args:
            adapter_name: its name.
            config: its configuration, which gives ranks and alpha by the module's name.
            tied_to: take over that layer's adapter, transposed, with its alpha.
        """
        if tied_to is not None:
            self.tied_to[adapter_name] = tied_to
            factor_a, factor_b = tied_to.factors(adapter_name)
            self.wara_A[adapter_name], self.wara_B[adapter_name] = (
                TransposedFactor(factor_b),
                TransposedFactor(factor_a),
            )
        elif config.form == "grid":
            self._create_grid(adapter_name, config)
        elif config.form == "tiny":
            self._create_tiny(adapter_name, config)
        else:
            ranks = config.ranks_of(self.module_name)
            factor = FACTORS[config.form]
            rows = factor(config.wavelet, config.levels, self.in_length, ranks, IN_DIM, self.kernel)
            self.wara_A[adapter_name] = rows
            self.wara_B[adapter_name] = factor(config.wavelet, config.levels, self.out_features, ranks, OUT_DIM)
        self.wara_dropout[adapter_name] = nn.Dropout(config.wara_dropout) if config.wara_dropout else nn.Identity()
        alpha = config.alpha_of(self.module_name if tied_to is None else tied_to.module_name)
        self.wara_alpha[adapter_name] = self.total_rank(adapter_name) if alpha is None else alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.set_scale(adapter_name, 1.0)
        self.reset_wara_parameters(adapter_name, config.init_weights)
        packed = getattr(self.get_base_layer(), "W_q", None)  # HQQ's name for its weight, which PEFT does not look for
        self._move_adapter_to_device_of_base_layer(adapter_name, None if packed is None else packed.device)
        self.set_adapter(self.active_adapters)

    def _create_grid(self, adapter_name: str, config: WaRAConfig) -> None:
        ranks, shared = config.ranks_of(self.module_name), config.shared_grid_pair
        self.wara_A[adapter_name] = GridFactor(self.in_features, ranks, IN_DIM, shared)
        self.wara_B[adapter_name] = GridFactor(self.out_features, ranks, OUT_DIM, shared)
        if shared:
            self.wara_gain[adapter_name] = nn.Parameter(torch.ones(len(ranks), next(iter(ranks.values()))))
        # A layer made outside of a model has only what the config says.
        grid = TokenGrid(config.grid_size, config.num_prefix_tokens, fixed=config.grid_size is not None)
        grid = config.token_grids.get(self.module_name, grid)
        channels = tuple(band for band in grid_subbands(config.levels) for _ in range(ranks[band.name]))
        self.token_mixing[adapter_name] = TokenMixing(self.module_name, grid, config.wavelet, channels)

    def _create_tiny(self, adapter_name: str, config: WaRAConfig) -> None:
        shape, ranks = (self.out_features, self.in_features), config.ranks_of(self.module_name)
        basis, core, rows, columns = tiny_factors(
            self.module_name, config.wavelet, config.levels, shape, ranks, config.core == "diagonal", config.save_basis
        )
        if config.needs_base_weights:
            fill_from_weight(rows, columns, base_weight(self.get_base_layer(), self.quantization_backend))
        self.wara_basis[adapter_name], self.wara_core[adapter_name] = basis, core
        self.wara_A[adapter_name], self.wara_B[adapter_name] = rows, columns

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT moves an adapter, which makes a new parameter of a gain: that trains only if the old one did."""
        trains = adapter_name in self.wara_gain and self.wara_gain[adapter_name].requires_grad
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if adapter_name in self.wara_gain:
            self.wara_gain[adapter_name].requires_grad_(trains)

    def reset_wara_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw A_s as LoRA draws A, with fan-in n_j, and set B_s to zero, or draw it too if `init_weights` is False.

        Then ‖row of Â‖² is about 1/3, as in LoRA, and ΔW = 0. With "orthogonal" rows of A_s are orthonormal. In place
        of A and B, `form="tiny"` has a core, which is zero, or drawn.
        """
        for rows in self.wara_A[adapter_name].parameters():
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
        if init_weights == "orthogonal":
            factor_a = self.factors(adapter_name)[0]
            for name in factor_a.subbands:
                nn.init.orthogonal_(factor_a.subband(name).detach())
        for columns in self.wara_B[adapter_name].parameters():
            if init_weights:
                nn.init.zeros_(columns)
            else:
                nn.init.kaiming_uniform_(columns, a=math.sqrt(5))
        if adapter_name in self.wara_core:
            for core in self.wara_core[adapter_name].parameters():
                (nn.init.zeros_ if init_weights else nn.init.normal_)(core)

    def factors(self, adapter_name: str) -> tuple[SubbandFactor, SubbandFactor]:
        """The modules that hand out Â and B̂ of an adapter."""
        return (
            cast(SubbandFactor, self.wara_A[adapter_name]),
            cast(SubbandFactor, self.wara_B[adapter_name]),
        )

    def total_rank(self, adapter_name: str) -> int:
        """R = Σ_s r_s, the rank of the LoRA that this adapter is."""
        return self.factors(adapter_name)[0].rank

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scaling to scale · alpha / R, or scale · alpha / √R with `use_rslora`."""
        if adapter not in self.wara_A:
            return
        initial = scaling(self.wara_alpha[adapter], self.total_rank(adapter), self.use_rslora[adapter])
        self.scaling[adapter] = scale * initial

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by `scale`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`, or, without one, set it back to its first value."""
        for adapter in self.active_adapters:
            if adapter not in self.scaling:
                continue
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    @property
    def groups(self) -> int:
        """Number of groups of a convolution, 1 for other layers."""
        return 1

    def check_has_delta_weight(self, adapter_names: Iterable[str]) -> None:
        """Refuse adapters whose change of the output no weight can make.

        Raises:
            ValueError: one of the adapters has `form="grid"` here.
        """
        for adapter_name in adapter_names:
            if adapter_name in self.token_mixing:
                raise ValueError(
                    f"Adapter {adapter_name!r} has form='grid', and in module {self.module_name!r} it mixes tokens, "
                    "which no weight of a layer can do: it has no ΔW, and cannot be merged or converted to LoRA. "
                    "Serve it unmerged."
                )

    def low_rank_update(self, adapter_name: str, dtype: torch.dtype | None = None) -> LowRankUpdate:
        """ΔW of an adapter as a pair of factors, Â and scaling · B̂: the adapter as a LoRA of rank R.

        Args:
            adapter_name: the adapter.
            dtype: dtype to compute in and to return; None means that of the adapter's parameters.

        Raises:
            ValueError: the adapter has no ΔW.
        """
        self.check_has_delta_weight([adapter_name])
        factor_a, factor_b = self.factors(adapter_name)
        scaled = factor_b.synthesise(dtype) * self.scaling[adapter_name]
        return LowRankUpdate(self.kind, factor_a.synthesise(dtype), scaled, self.groups)

    def get_delta_weight(self, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
        """Scaled ΔW of an adapter, in the shape and orientation of the base weight.

        Args:
            adapter: the adapter.
            dtype: dtype to compute in and to return; None means that of the adapter's parameters, computed in float32
                where those are shorter.
        """
        self.check_has_delta_weight([adapter])
        own = self.factors(adapter)[0].dtype
        return self.low_rank_update(adapter, torch.promote_types(dtype or own, torch.float32)).dense(dtype or own)

    def _add_product(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """The base layer's result plus what an adapter adds to it for the input x."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Result of the base layer plus what the active adapters add to it.

        Args:
            x: input of the base layer, passed on with all other arguments.
            adapter_names: for each sample of the batch the adapter to use, or "__base__", in place of the active ones.

        Raises:
            ValueError: `adapter_names` has another length than the batch, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._add_mixed_products(result, x, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.wara_A:
                result = self._add_product(result, x, adapter)
        return result.to(dtype)

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _add_mixed_products(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.wara_A:
                samples = [index for index, name in enumerate(adapter_names) if name == adapter]
                chosen = torch.tensor(samples, device=x.device)
                part = self._add_product(result.index_select(0, chosen), x.index_select(0, chosen), adapter)
                result = result.index_copy(0, chosen, part.to(result.dtype))
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the ΔW of adapters to the base weight, in float32 or better and with one rounding.

        Args:
            safe_merge: check that the merged weight is finite before it replaces the base weight.
            adapter_names: adapters to merge; None means the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite; the base weight is untouched.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.wara_A]
        if not names:
            return
        self.check_has_delta_weight(names)
        try:
            self._add_to_base_weight(names, sign=1, check_finite=safe_merge)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11 on
                error.add_note(f"This happened while merging into module {self.module_name!r}.")
            raise
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Subtract the ΔW of all merged adapters from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self._add_to_base_weight(self.merged_adapters, sign=-1, check_finite=False)
        self.merged_adapters = []

    @torch.no_grad()
    def _add_to_base_weight(self, adapter_names: list[str], sign: int, check_finite: bool) -> None:
        weight = self.get_base_weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(dtype, copy=True)
        for name in adapter_names:
            if name in self.tied_to and self.get_base_layer().weight is self.tied_to[name].get_base_layer().weight:
                continue  # the one weight of both layers gets its ΔW from the other
            total.add_(self.get_delta_weight(name, dtype).to(total.device), alpha=sign)
        merged = total.to(weight.dtype)
        if check_finite and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken "
                f"in module {self.module_name!r}. The base weight is unchanged; merge without this adapter, or load "
                "it again from a good checkpoint."
            )
        self.set_base_weight(merged)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a LoRA of rank R, which `wara_peft.to_lora` converts without error: all but grids."""
        return adapter_name not in self.token_mixing

    def __repr__(self) -> str:
        return "wara." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class Linear(WaRALayer):
    """WaRA beside a linear layer: result = base(x) + scaling · (x Âᵀ) B̂ᵀ, for x of shape (..., n).

    With `form="grid"` the hidden channels x Âᵀ of all tokens pass through the wavelet before they meet B̂.
    The base layer is an `nn.Linear`, one of the quantized layers that PEFT knows, or transformers' `Conv1D`. ΔW is
    never built; the product lands in the result by `torch.addmm`.
    """

    def _add_product(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        factor_a, factor_b = self.wara_A[adapter](), self.wara_B[adapter]()  # (R, n), (m, R)
        x = self.wara_dropout[adapter](self._cast_input_dtype(x, factor_a.dtype))
        hidden = F.linear(x, factor_a)  # (..., R)
        if adapter in self.token_mixing:
            hidden = self.token_mixing[adapter](hidden, self.wara_gain.get(adapter))
        return add_low_rank(result, hidden, factor_b, self.scaling[adapter])


def add_low_rank(result: Tensor, hidden: Tensor, factor_b: Tensor, scaling: float) -> Tensor:
    """result + scaling · hidden B̂ᵀ in one operation, in the wider dtype of the two.

    Args:
        result: (..., m).
        hidden: (..., R), x Âᵀ.
        factor_b: B̂, (m, R).
        scaling: the adapter's scaling.
    """
    dtype = torch.promote_types(result.dtype, hidden.dtype)
    with autocast_off([result]):  # it has chosen these dtypes, and would round a wider result once more
        product = torch.addmm(
            result.reshape(-1, result.shape[-1]).to(dtype),
            hidden.reshape(-1, hidden.shape[-1]).to(dtype),
            factor_b.to(dtype).T,
            alpha=scaling,
        )
    return product.view(result.shape)
