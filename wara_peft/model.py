"""`WaRAModel`: checks all target modules, then replaces them; merges all of them or none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    find_parameter_name_by_module,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .checks import check_adapter_name, check_base_weights, check_grids, check_targets, first
from .combine import combine
from .config import WaRAConfig
from .conv import Conv
from .embedding import Embedding
from .layer import Linear, WaRALayer
from .quantization import keep_unpacked
from .restore import undone_on_error
from .tiny import base_weight
from .vision import token_grid

SUPPORTED = (
    "`torch.nn.Linear` (also quantized), `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, `torch.nn.Conv3d`"
    " and `transformers.pytorch_utils.Conv1D`"
)


class WaRAModel(BaseTuner):
    """A model with WaRA adapters, made by `get_peft_model(model, WaRAConfig(...))`.

    Args:
        model: the base model; its target modules are replaced in place.
        config: a `WaRAConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's parameters on the meta device.

    Raises:
        TypeError: a target module is of a kind that WaRA does not adapt.
        ValueError: the adapter's name is reserved, no module matches, a module is left without any rank, or a saved
            adapter was made for modules of other shapes. All of this is found before the first module is replaced.
    """

    prefix: str = "wara_"
    tuner_layer_cls = WaRALayer
    # Modules named by a state dict from which an adapter is being injected, in place of the config's targets.
    _named_by_state_dict: set[str] | None = None
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter of that name to all its target modules, and record their shapes in its config."""
        state_dict = kwargs.get("state_dict")
        if state_dict is not None:
            self._named_by_state_dict = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
        try:
            check_adapter_name(adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # transformers' add_adapter hands in the model's own dict, which must not keep a failed adapter.
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self._named_by_state_dict = None
        keep_unpacked(model)
        config = cast(WaRAConfig, self.peft_config[adapter_name])
        config.module_shapes = {
            name: [module.kind, module.out_features, module.in_length, *([module.groups] if module.groups > 1 else [])]
            for name, module in model.named_modules()
            if isinstance(module, WaRALayer) and adapter_name in module.wara_A and adapter_name not in module.tied_to
        }

    def _prepare_model(self, peft_config: WaRAConfig, model: nn.Module) -> None:  # type: ignore[override]
        """PEFT calls this with the resolved config, before the first replacement: the place to check all targets."""
        _maybe_include_all_linear_layers(peft_config, model)
        bases: dict[str, nn.Module] = {}
        unsupported = []
        only_linear = peft_config.form in ("grid", "tiny") or not isinstance(peft_config.init_weights, bool)
        for name, module in self._targets(peft_config, model):
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            layer_class = self._layer_class(base)
            if layer_class is None or (only_linear and layer_class is not Linear):
                unsupported.append(f"{name} ({type(base).__name__})")
            bases[name] = base
        if unsupported:
            supported = SUPPORTED
            if only_linear:
                choice = f"form={peft_config.form!r} and init_weights={peft_config.init_weights!r}"
                supported = f"linear layers (also quantized, and transformers' `Conv1D`) with {choice}"
            raise TypeError(
                f"Target module {first(unsupported)} is not supported. WaRA adapts {supported}. Name other modules "
                "in `target_modules`, or leave these out with `exclude_modules`."
            )
        shapes = {name: _axis_lengths(base) for name, base in bases.items()}
        check_targets(peft_config, shapes)
        if peft_config.form == "grid":
            peft_config.token_grids = {name: token_grid(model, name, peft_config) for name in bases}
            check_grids(peft_config)
        if peft_config.needs_base_weights:
            weights = ((name, self._base_weight(name, base)) for name, base in bases.items())
            check_base_weights(peft_config, weights, shapes)

    def _base_weight(self, name: str, base_layer: nn.Module) -> Tensor:
        backend = resolve_quantization_backend(base_layer, **get_quantization_kwargs(self.model))
        try:
            return base_weight(base_layer, backend)
        except TypeError as error:  # of backends that cannot dequantize
            raise ValueError(
                f"form='tiny' needs the weight of module {name!r}: {error} Use form='subband', or a base model that "
                "is quantized otherwise."
            ) from error

    def _targets(self, peft_config: WaRAConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for name, module in model.named_modules():
            if not name or name.startswith(inside) or self._check_tied_module_exists(peft_config, name):
                continue
            named = self._named_by_state_dict
            if self._check_target_module_exists(peft_config, name) if named is None else name in named:
                yield name, module

    def _layer_class(self, base_layer: nn.Module) -> type[WaRALayer] | None:
        if isinstance(base_layer, (nn.Linear, Conv1D)):
            return Linear
        if isinstance(base_layer, nn.Embedding):
            return Embedding
        if isinstance(base_layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return Conv
        backend = resolve_quantization_backend(base_layer, **get_quantization_kwargs(self.model))
        return Linear if backend is not None and backend.layer_type == "linear" else None

    def _create_and_replace(  # type: ignore[override]  # only WaRA's configs come here
        self,
        peft_config: WaRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        tied_to = None
        if self._check_tied_module_exists(peft_config, current_key):
            tied_to = cast(WaRALayer, self.model.get_input_embeddings())
        if isinstance(target, WaRALayer):
            target.update_layer(adapter_name, peft_config, tied_to=tied_to)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer_class = self._layer_class(base)
        assert layer_class is not None  # _prepare_model has looked at every target
        quantization = get_quantization_kwargs(self.model)
        layer = layer_class(target, adapter_name, current_key, peft_config, tied_to, **quantization)
        if adapter_name not in self.active_adapters:
            # A further adapter trains only once it is activated.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in another's place; adapter layers have moved to their base layer's device already."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT casts an adapter, which makes new parameters of gains: they train only if the old ones did."""
        gains = [module.wara_gain for module in self.modules() if isinstance(module, WaRALayer)]
        before = [(gain, gain[adapter_name].requires_grad) for gain in gains if adapter_name in gain]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for gain, trains in before:
            gain[adapter_name].requires_grad_(trains)

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Target the input embedding, and leave the layers tied to it to its adapter."""
        tied_weight_keys = _unwrapped(tied_weight_keys)
        peft_config.target_modules_to_tie = set(tied_weight_keys)
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())
        if isinstance(peft_config.target_modules, str):
            peft_config.target_modules = rf"(?:{peft_config.target_modules})|{re.escape(embedding)}"
        else:
            peft_config.target_modules = {embedding, *_without(peft_config.target_modules, tied_weight_keys)}

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Train the input embedding in full, and let the layers tied to it use its copy."""
        tied_weight_keys = _unwrapped(tied_weight_keys)
        peft_config.modules_to_tie = set(tied_weight_keys)
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())
        others = [name for name in _without(peft_config.modules_to_save, tied_weight_keys) if name != embedding]
        peft_config.modules_to_save = [*others, embedding]

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter that combines others, with ΔW = Σ_i weights[i] ΔW_i for "cat".

        Args:
            adapters: names of the adapters to combine.
            weights: a weight for each, negative ones included.
            adapter_name: name of the new adapter, which is not activated.
            combination_type: "cat" is exact and adds up the ranks; adapters that share wavelet, levels and form
                `subband` keep their subbands, others meet as rows of the undecomposed matrix `aa0`. "linear" adds up
                the factors, Σ ±√(|weight| scaling) A_i and Σ √(|weight| scaling) B_i, as in LoRA, which needs equal
                layouts, keeps the rank and is not ΔW's sum. Modules that an adapter trains in full (`modules_to_save`)
                are not part of the combination.

        Raises:
            ValueError: an adapter is missing, there already is one of the new name, numbers of adapters and weights
                differ, several train the same module in full, or "linear" meets different layouts.
        """
        combine(self, adapters, weights, adapter_name, combination_type)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one for each sample of the batch, to all adapter layers during a forward or generate.

        Raises:
            ValueError: the model is training, or no layer has an adapter of one of these names.
        """
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, WaRALayer)]
        known = {"__base__"}.union(*(layer.wara_A.keys() for layer in layers))
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # Beam search repeats each sample, except in the encoder, which runs before.
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = getattr(self.model, "get_encoder", lambda: None)()
        in_encoder = set() if encoder in (None, self.model) else set(encoder.modules())
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, (WaRALayer, AuxiliaryTrainingWrapper)):
                    names = list(adapter_names) if module in in_encoder else repeated
                    hook = partial(_pass_adapter_names, adapter_names=names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, module in self.model.named_modules():
            backend = module.quantization_backend if isinstance(module, WaRALayer) else None
            if backend is not None and not backend.supports_merge:
                raise ValueError(
                    f"Cannot merge into module {name!r}: {backend.backend_name} weights cannot be written. Serve the "
                    "adapter unmerged, or merge it into the unquantized model."
                )

    def _check_has_delta_weights(self, adapter_names: list[str] | None) -> None:
        """Refuse to merge what cannot be merged before the first weight is touched."""
        for module in self.model.modules():
            if isinstance(module, WaRALayer):
                module.check_has_delta_weight(module.active_adapters if adapter_names is None else adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge into the base weights, all or nothing: if one module fails, every weight is as it was before.

        For this the base weights of the target modules are kept, in main memory, until the last one is merged.
        """
        self._check_has_delta_weights(adapter_names)
        with undone_on_error(self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT annotates None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_has_delta_weights(adapter_names)
        with undone_on_error(self.model) if merge else nullcontext():
            return super()._unload_and_optionally_merge(  # type: ignore[return-value]
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _unwrapped(names: list[str]) -> list[str]:
    """Module names without what an earlier adapter has put around the module."""
    return [name.removesuffix(".base_layer") for name in names]


def _without(names: Iterable[str], keys: list[str]) -> list[str]:
    """The names that do not stand for one of these modules."""
    return [name for name in names if not any(key == name or key.endswith(f".{name}") for key in keys)]


def _axis_lengths(base_layer: nn.Module) -> tuple[int, int]:
    """Lengths of the out and in axes that are transformed; in grouped convolutions a group's in channels."""
    in_features, out_features = cast(tuple[int, int], _get_in_out_features(base_layer))
    return out_features, in_features // int(getattr(base_layer, "groups", 1))
