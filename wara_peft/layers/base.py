"""`WaRALayer`, the base class of adapter layers: it holds a base layer and the factors Â and B̂ of each adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from ..base_layers.kinds import Kind, shape_of
from ..base_layers.quantization import base_weight
from ..config import WaRAConfig, scaling
from ..forms import Form, Parts, SubbandFactor, TiedFactor
from ..wavelet import autocast_off, is_autocast_on
from .enabling import TrainedBefore, enable_adapters
from .low_rank_update import LowRankUpdate, update_of
from .merging import MergingLayer

TENSOR_PARTS = ("wara_A", "wara_B", "wara_gain", "wara_core", "wara_basis")
"""The containers in `PARTS` whose parts hold tensors."""
PARTS = (*TENSOR_PARTS, "token_mixing")
"""Attributes of a layer that hold parts of adapters, by the adapter's name."""


class _PartsOfLayer(Mapping[str, Any]):
    """The parts of one adapter. Every access looks them up in the layer, since a replica of it has other parts."""

    def __init__(self, layer: WaRALayer, adapter_name: str) -> None:
        self.layer = layer
        self.adapter_name = adapter_name

    def __getitem__(self, name: str) -> Any:
        container = getattr(self.layer, name)
        if self.adapter_name not in container:
            raise KeyError(name)
        return container[self.adapter_name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in PARTS if self.adapter_name in getattr(self.layer, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class WaRALayer(MergingLayer):
    """Has what all WaRA layers share: the factors, scaling, forward and merging of each adapter, by its name.

    Args:
        base_layer: the layer that is adapted.
        adapter_name: name of its first adapter.
        module_name: the layer's full name in the model. Configs give ranks by it, and errors name it.
        config: that adapter's configuration.
        tied_to: the layer whose weight this layer's weight is tied to, and whose adapter it takes over.
        context: facts that the adapter's form has found out about the model around the layer.
        kwargs: arguments for PEFT's quantization backends.

    Attributes:
        shape: kind of the base layer, lengths of the axes that are transformed, a convolution's groups and kernel.
        forms: for each adapter its form.
        wara_A, wara_B: for each adapter one side of its pairs. `factors` returns the modules that compute Â (R, n) and
            B̂ (m, R) from these.
        wara_gain, wara_core, wara_basis, token_mixing: further parts that some forms have.
        wara_alpha, scaling: for each adapter the numerator of its scaling, and the scaling in use.
        r: for each adapter R, as scripts read LoRA's `r`; `wara_alpha` stands for `lora_alpha`.
        in_model: for each adapter the fields of its config as they are in this model, which all its layers share.
    """

    adapter_layer_names: tuple[str, ...] = TENSOR_PARTS
    other_param_names: tuple[str, ...] = (
        "forms",
        "in_model",
        "r",
        "wara_alpha",
        "scaling",
        "use_rslora",
        "wara_dropout",
        "tied_to",
        "token_mixing",
    )

    def __init_subclass__(cls, kinds: Iterable[Kind] = (), **kwargs: Any) -> None:
        """Enter the subclass as the adapter layer of these kinds."""
        super().__init_subclass__(**kwargs)
        for kind in kinds:
            kind.layer_class = cls

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        module_name: str,
        config: WaRAConfig,
        tied_to: WaRALayer | None = None,
        context: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = self.get_base_layer().training
        self.module_name = module_name
        self.forms: dict[str, Form] = {}
        self.wara_A = nn.ModuleDict({})
        self.wara_B = nn.ModuleDict({})
        self.wara_gain = nn.ParameterDict({})
        self.wara_core = nn.ModuleDict({})
        self.wara_basis = nn.ModuleDict({})
        self.wara_dropout = nn.ModuleDict({})
        self.in_model: dict[str, Mapping[str, Any]] = {}
        self.r: dict[str, int] = {}
        self.wara_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.tied_to: dict[str, WaRALayer] = {}
        self.token_mixing: dict[str, Any] = {}
        self._disable_adapters = False
        self._trained_before: TrainedBefore | None = None
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.shape = shape_of(self.get_base_layer())
        self.in_features, self.out_features = self.shape.in_features * self.shape.groups, self.shape.out_features
        self.update_layer(adapter_name, config, module_name, tied_to, context)
        # PyTorch makes containers in train mode, and only what is inside has been put into the base layer's.
        for name in (*self.adapter_layer_names, "wara_dropout"):
            getattr(self, name).training = self.training

    @property
    def kind(self) -> Kind:
        """The kind of the base layer."""
        return self.shape.kind

    def update_layer(
        self,
        adapter_name: str,
        config: WaRAConfig,
        module_name: str | None = None,
        tied_to: WaRALayer | None = None,
        context: Any = None,
    ) -> None:
        """Add an adapter with initial values, on the device and in the mode (train or eval) of the base layer.

        Args:
            adapter_name: its name.
            config: its configuration, which gives ranks and alpha by the module's name.
            module_name: the layer's full name in the model into which the adapter is injected; None keeps the name.
            tied_to: the layer whose adapter, with its alpha, this layer takes over.
            context: facts that the form has found out about the model around the layer.
        """
        module_name = self.module_name = self.module_name if module_name is None else module_name
        self.forms[adapter_name] = config.form_object
        if tied_to is not None:
            self._tie(adapter_name, tied_to)
        else:
            ranks = config.ranks_of(module_name)
            parts = config.form_object.create(config, module_name, self.shape, ranks, context)
            for name, part in parts.items():
                getattr(self, name)[adapter_name] = part
            # A saved adapter's file may bring these values. Then an SVD of every weight would be for nothing.
            if not config.form_object.may_be_loaded(parts):
                self._fill_from_weight(adapter_name)
        self.wara_dropout[adapter_name] = nn.Dropout(config.wara_dropout) if config.wara_dropout else nn.Identity()
        self.r[adapter_name] = self.total_rank(adapter_name)
        alpha = config.alpha_of(module_name if tied_to is None else tied_to.module_name)
        self.wara_alpha[adapter_name] = self.r[adapter_name] if alpha is None else alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.set_scale(adapter_name, 1.0)
        if tied_to is None:
            self.reset_wara_parameters(adapter_name, config.init_weights)
        # HQQ calls its weight `W_q`. PEFT does not look for it, and would not find the device.
        packed = getattr(self.get_base_layer(), "W_q", None)
        self._move_adapter_to_device_of_base_layer(adapter_name, None if packed is None else packed.device)
        for container in (self.wara_A, self.wara_B, self.wara_core, self.wara_basis, self.wara_dropout):
            if adapter_name in container:
                container[adapter_name].train(self.get_base_layer().training)
        self.set_adapter(self.active_adapters)

    def _tie(self, adapter_name: str, tied_to: WaRALayer) -> None:
        """Take over another layer's adapter. If one of the layers keeps the weight transposed, A and B swap."""
        self.tied_to[adapter_name] = tied_to
        factor_a, factor_b = tied_to.factors(adapter_name)
        transposed = self.kind.keeps_in_first != tied_to.kind.keeps_in_first
        sources = (factor_b, factor_a) if transposed else (factor_a, factor_b)
        self.wara_A[adapter_name], self.wara_B[adapter_name] = (TiedFactor(source, transposed) for source in sources)

    def tie_again(self, tied_to: WaRALayer) -> None:
        """Tie all adapters that are tied to that layer instead; a replica of the model needs its own layer there."""
        self.tied_to = dict(self.tied_to)  # a replica shares the dict with the layer from which it is copied
        for adapter_name in self.tied_to:
            self._tie(adapter_name, tied_to)

    def parts(self, adapter_name: str) -> Parts:
        """Return the parts of an adapter, by the name of the container that holds them."""
        return _PartsOfLayer(self, adapter_name)

    def _fill_from_weight(self, adapter_name: str) -> None:
        """Make those values of parts that come from the base layer's weight, if they are missing."""
        form, parts = self.forms[adapter_name], self.parts(adapter_name)
        if form.needs_weight(parts):
            form.fill(
                parts, self.module_name, self.shape, base_weight(self.get_base_layer(), self.quantization_backend)
            )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter as PEFT does. PEFT makes a new parameter of a gain; it trains only if the old one did."""
        trains = adapter_name in self.wara_gain and self.wara_gain[adapter_name].requires_grad
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if adapter_name in self.wara_gain:
            self.wara_gain[adapter_name].requires_grad_(trains)

    def reset_wara_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Give an adapter its first values, as its form does for `WaRAConfig.init_weights`: ΔW = 0 if that is True."""
        self.forms[adapter_name].initialise(self.parts(adapter_name), init_weights)

    def factors(self, adapter_name: str) -> tuple[SubbandFactor, SubbandFactor]:
        """Return the modules that compute Â and B̂ of an adapter."""
        form = self.forms[adapter_name]
        if form.factors_are_parts or adapter_name in self.tied_to:
            return self.wara_A[adapter_name], self.wara_B[adapter_name]  # type: ignore[return-value]
        parts = self.parts(adapter_name)
        if form.needs_weight(parts):  # a saved adapter's config was injected, and its file was never loaded
            self._fill_from_weight(adapter_name)
        return form.factors(parts)

    def total_rank(self, adapter_name: str) -> int:
        """Return R = Σ_s r_s, the rank of this adapter seen as a LoRA."""
        return cast(SubbandFactor, self.wara_A[adapter_name]).rank

    def initial_scaling(self, adapter_name: str) -> float:
        """Return alpha / R, or alpha / √R with `use_rslora`."""
        return scaling(self.wara_alpha[adapter_name], self.total_rank(adapter_name), self.use_rslora[adapter_name])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scaling to scale · alpha / R, or scale · alpha / √R with `use_rslora`."""
        if adapter in self.wara_A:
            self.scaling[adapter] = scale * self.initial_scaling(adapter)

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

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters. Disabling freezes them; parameters that trained before train again later."""
        parameters = {
            f"{container}.{name}": parameter
            for container in self.adapter_layer_names
            for name, parameter in getattr(self, container).named_parameters()
        }
        self._trained_before = enable_adapters(
            enabled, self._trained_before, parameters, lambda: self.active_adapters, super().enable_adapters
        )

    def check_has_delta_weight(self, adapter_names: Iterable[str]) -> None:
        """Refuse adapters whose change of the output no weight can make.

        Raises:
            ValueError: one of the adapters has a form without ΔW here.
        """
        for adapter_name in adapter_names:
            if adapter_name in self.forms and not self.forms[adapter_name].has_delta_weight:
                raise ValueError(
                    f"Adapter {adapter_name!r} has form={self.forms[adapter_name].name!r}, and in module "
                    f"{self.module_name!r} it mixes tokens, which no weight of a layer can do: it has no ΔW, and "
                    "cannot be merged or converted to LoRA. Serve it unmerged."
                )

    def low_rank_update(self, adapter_name: str, dtype: torch.dtype | None = None) -> LowRankUpdate:
        """Return ΔW of an adapter as a pair of factors, Â and scaling · B̂, which is a LoRA of rank R.

        Args:
            adapter_name: the adapter.
            dtype: dtype to compute in and to return; None means that of the adapter's parameters.

        Raises:
            ValueError: the adapter has no ΔW.
        """
        self.check_has_delta_weight([adapter_name])
        factor_a, factor_b = self.factors(adapter_name)
        scaled = factor_b.synthesise(dtype) * self.scaling[adapter_name]
        return update_of(self.shape, factor_a.synthesise(dtype), scaled)

    def get_delta_weight(self, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the scaled ΔW of an adapter, in the shape and orientation of the base weight.

        Args:
            adapter: the adapter.
            dtype: dtype of the result; None means that of the adapter's parameters. The product is computed in float32
                if that dtype is narrower.
        """
        self.check_has_delta_weight([adapter])
        own = self.factors(adapter)[0].dtype
        return self.low_rank_update(adapter, torch.promote_types(dtype or own, torch.float32)).dense(dtype or own)

    def _add_product(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """Return the base layer's result plus what an adapter adds to it for the input x."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Compute the base layer's result plus what the active adapters add to it.

        Args:
            x: input of the base layer, which gets all other arguments as well.
            adapter_names: for each sample of the batch the adapter to use, or "__base__" for none, in place of the
                active adapters.

        Raises:
            ValueError: `adapter_names` has another length than the batch, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        # PEFT's properties `disable_adapters` and `merged` say the same, but their calls cost time in every layer.
        disabled, merged = self._disable_adapters, self.merged_adapters
        if disabled and merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if disabled or merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            # A 4-bit layer may return a view that backward cannot go through once something is added to it.
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._add_mixed_products(result, x, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.scaling:
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

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `wara_peft.to_lora` converts the adapter exactly, to rank R: true of every form that has a ΔW."""
        return self.forms[adapter_name].has_delta_weight

    def __getattr__(self, name: str) -> Any:
        """Answer for the base layer, since other modules read attributes off it, such as a convolution's `stride`.

        Names that begin with an underscore are not looked up there: libraries set and delete such attributes, hooks
        for example, on this layer, and would take the base layer's for them.
        """
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # nn.Module's own lookup gives the same, and costs a further call in every forward
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A layer that is being copied or unpickled has no base layer yet.
            if name.startswith("_") or "base_layer" not in modules:
                raise
            return getattr(self.get_base_layer(), name)

    def __repr__(self) -> str:
        return "wara." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def add_low_rank(result: Tensor, hidden: Tensor, factor_b: Tensor, scaling: float) -> Tensor:
    """Compute result + scaling · hidden B̂ᵀ in one operation, in the wider dtype of result and hidden.

    Args:
        result: (..., m).
        hidden: (..., R), x Âᵀ.
        factor_b: B̂, (m, R).
        scaling: the adapter's scaling.
    """
    rows, channels = result.reshape(-1, result.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    if result.dtype == hidden.dtype == factor_b.dtype and not is_autocast_on(result.device):
        return torch.addmm(rows, channels, factor_b.T, alpha=scaling).view(result.shape)
    dtype = torch.promote_types(result.dtype, hidden.dtype)
    # Under autocast `addmm` would round a wider result to half precision. The dtypes are chosen already.
    with autocast_off([result]):
        product = torch.addmm(rows.to(dtype), channels.to(dtype), factor_b.to(dtype).T, alpha=scaling)
    return product.view(result.shape)
