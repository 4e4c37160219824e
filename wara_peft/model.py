"""`WaRAModel`: checks all target modules, then replaces them; merges all of them or none."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, cast

from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)
from torch import Tensor, nn

from .base_layers.embeddings import embedding_or_none
from .base_layers.kinds import kind_of
from .base_layers.never_called import keep_called, undo_keep_called
from .base_layers.quantization import keep_unpacked
from .compiled import compiled_in_place, plain_model, plain_name
from .config import WaRAConfig
from .config_fields.name_patterns import patterns_unseen
from .config_fields.resolution import note_for_saving, take_back_resolution
from .dequantized import unmark_dequantized
from .forms import factors_of_one_call, stop_observing
from .injection.adapter_names import check_adapter_name
from .injection.combine import combine
from .injection.expected_file import AwaitedAdapter
from .injection.loading_over import check_keys, check_saved_adapter
from .injection.merging import check_merge, unmerge
from .injection.mixed_batch import mixed_batch
from .injection.pad_token import warn_of_pad_token
from .injection.rollback import undone_on_error
from .injection.saved_besides_factors import keys_in_model, saved_besides_factors
from .injection.target_checks import (
    targeted_names,
)
from .injection.target_parameters import (
    adapt_parameter,
    named_parameters,
    projections,
)
from .injection.targets import Injection, check_injection, find_and_check_targets, resolve_targets
from .injection.weight_tying import adapt_embedding_of_tied, keep_ties_in_replicas, train_embedding_of_tied
from .layers.base import WaRALayer
from .layers.enabling import TrainedBefore, enable_adapters
from .layers.lookup import adapted_layers, fields_in_model, is_of_a_factor, note_fields


class WaRAModel(BaseTuner):
    """A model with WaRA adapters, made by `get_peft_model(model, WaRAConfig(...))`.

    Args:
        model: the base model; its target modules are replaced in place.
        config: a `WaRAConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's parameters on the meta device.

    Raises:
        TypeError: a target module is of a kind that WaRA does not adapt.
        ValueError: the adapter's name is reserved, no module matches, or a module is never called or left without any
            rank. All of this is found before the first module is replaced. A saved adapter that was made for modules
            of other shapes is refused when its file is loaded, and then removed again.

    Attributes:
        peft_config: for each adapter the object that was passed in. Targets are resolved in it, as PEFT does it for
            every method; what this model finds out besides, its layers keep, so that the object can serve others.
    """

    prefix: str = "wara_"
    tuner_layer_cls = WaRALayer
    # State has its first value in the class, for PEFT's `__init__` injects the first adapter before it returns.
    _injection = Injection()
    # Adapters that are being loaded: their config has arrived, their tensors have not.
    _awaited: Mapping[str, AwaitedAdapter] = {}
    _trained_before: TrainedBefore | None = None
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter of that name to all its target modules; their shapes are saved with it.

        Modules that `torch.compile` has wrapped are compiled in place from then on, which keeps their plain names.
        """
        with compiled_in_place(model) as plain:
            if self.model is model:  # PEFT's `__init__` has stored the wrapper here
                self.model = plain
            self._inject(plain, adapter_name, *args, **kwargs)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = cast(WaRAConfig, self.peft_config[adapter_name])
        in_state_dict = None
        if kwargs.get("state_dict") is not None:
            # PEFT reads the target modules off these keys, and would take every key for a factor's.
            factors = {plain_name(key): value for key, value in kwargs["state_dict"].items() if is_of_a_factor(key)}
            kwargs["state_dict"] = factors
            in_state_dict = {key.rsplit(f".{self.prefix}", 1)[0] for key in factors}
        # PEFT writes the resolved targets into the user's own object, so an error has to restore it.
        before = dict(vars(config))
        written = take_back_resolution(config)
        named = targeted_names(config) if config.module_shapes is None else set()
        self._injection = Injection(adapter_name, named, in_state_dict)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        try:
            check_adapter_name(adapter_name)
            with patterns_unseen(config):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # transformers' `add_adapter` passes in the model's own dict of configs, which must not keep it.
            self.peft_config.pop(adapter_name, None)
            vars(config).update(before)
            raise
        keep_unpacked(model)
        unmark_dequantized(model)
        note_fields(model, adapter_name, config, written)
        # An adapter of the same name may have been deleted before its tensors were loaded.
        awaited = {name: other for name, other in self._awaited.items() if name != adapter_name}
        if config.module_shapes is not None:
            awaited[adapter_name] = AwaitedAdapter(config, trained)
        self._awaited = awaited
        keep_ties_in_replicas(model)
        keep_called(model)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Refuse the file of an adapter that was made for another model, and take the adapter out again.

        PyTorch's `load_state_dict` calls this on a module before it goes on to its children. So the check comes before
        the first tensor of a layer is copied.
        """
        for adapter_name in [name for name in self._awaited if name in self.peft_config]:
            with self._taken_out_on_error(adapter_name):
                given = self._awaited[adapter_name].check_if_given(self, adapter_name, state_dict, prefix)
            if given:
                self._awaited = {name: other for name, other in self._awaited.items() if name != adapter_name}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @contextmanager
    def _taken_out_on_error(self, adapter_name: str) -> Iterator[None]:
        """Scope for checks of a saved adapter's tensors: an error removes the adapter that was added for them."""
        try:
            yield
        except ValueError:
            if adapter_name in self._awaited and len(self.peft_config) > 1:
                self.delete_adapter(adapter_name)
            elif adapter_name in self._awaited:
                # Without its only adapter the model is a plain one again, and trains what it trained before injection.
                self.unload()
                for name in self._awaited[adapter_name].trained:
                    self.model.get_parameter(name).requires_grad_(True)
            raise

    def _prepare_model(self, peft_config: WaRAConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Check all targets, and warn: PEFT calls this with the resolved config, before it replaces the first module.

        So a warning that is turned into an error leaves the model unchanged.
        """
        configs = cast(dict[str, WaRAConfig], self.peft_config)
        check_injection(model, peft_config, configs, self._injection)

    @classmethod
    def targets_of(cls, model: nn.Module, config: WaRAConfig) -> dict[str, nn.Module]:
        """Find and check, as an injection does, the modules and bare parameters that the config would adapt, by name.

        Raises:
            TypeError: a target is of a kind that WaRA does not adapt.
            ValueError: a target has no rank or is never called, or PEFT has no default targets for this model.
        """
        tuner = cls.__new__(cls)  # without `__init__`, which would inject an adapter
        nn.Module.__init__(tuner)
        tuner.model = model
        config = copy.deepcopy(config)
        take_back_resolution(config)
        resolved = tuner._prepare_adapter_config(config, cls.get_model_config(model))
        return find_and_check_targets(model, resolved, tuner._injection)

    def _prepare_adapter_config(self, peft_config: WaRAConfig, model_config: dict[str, Any]) -> WaRAConfig:  # type: ignore[override]
        """Resolve targets as PEFT does for LoRA, also in the experts of a mixture; see `resolve_targets`."""
        # PEFT raises an error for a model without default targets. A config that names parameters needs none.
        if peft_config.target_modules is None and peft_config.target_parameters:
            default = self.target_module_mapping.get(model_config["model_type"], ())
            peft_config.target_modules = default if isinstance(default, str) else list(default)
        super()._prepare_adapter_config(peft_config, model_config)
        resolve_targets(self.model, peft_config, self._injection)
        return peft_config

    def _inject_parameters(  # type: ignore[override]
        self, peft_config: WaRAConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the bare parameters that the config names; `_prepare_model` has checked them."""
        found, trains = list(named_parameters(peft_config, model)), adapter_name in self.active_adapters
        for parameter in found:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                adapt_parameter(parameter, model, peft_config, adapter_name, trains)
        return [parameter.full_name for parameter in found]

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
        # `nn.MultiheadAttention` calls no layer for its projections, so its weights are adapted as bare parameters.
        of_attention = projections(current_key, target)
        trains = adapter_name in self.active_adapters
        for parameter in of_attention:
            adapt_parameter(parameter, self.model, peft_config, adapter_name, trains)
        if of_attention:
            return
        tied_to = None
        if self._check_tied_module_exists(peft_config, current_key):
            tied_to = cast(WaRALayer, self.model.get_input_embeddings())
        context = peft_config.form_object.context(peft_config, self.model, current_key)
        if isinstance(target, WaRALayer):
            target.update_layer(adapter_name, peft_config, current_key, tied_to, context)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = get_quantization_kwargs(self.model)
        layer_class: type[WaRALayer] = kind_of(base).layer_class
        layer = layer_class(target, adapter_name, current_key, peft_config, tied_to, context, **quantization)
        if adapter_name not in self.active_adapters:
            # A further adapter trains only once it is activated.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in another's place. PEFT would also move it, but an adapter layer has moved itself already."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter as PEFT does. PEFT makes new parameters of gains; they train only if the old ones did."""
        gains = [layer.wara_gain for layer in adapted_layers(self).values()]
        before = [(gain, gain[adapter_name].requires_grad) for gain in gains if adapter_name in gain]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for gain, trains in before:
            gain[adapter_name].requires_grad_(trains)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Enable or disable all adapters; heads and tokens that were frozen before are frozen again when enabled."""
        parameters = {
            f"{name}.{inner}": parameter
            for name, module in self.model.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
            for inner, parameter in module.named_parameters()
        }
        self._trained_before = enable_adapters(
            enabled, self._trained_before, parameters, lambda: self.active_adapters, super()._enable_adapter_layers
        )

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        adapt_embedding_of_tied(self.model, peft_config, tied_weight_keys)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        train_embedding_of_tied(self.model, peft_config, tied_weight_keys)

    @property
    def get_input_embeddings(self) -> Callable[[], nn.Module | None]:
        """The base model's function, which here returns None where transformers raises an error, as in speech models.

        PEFT calls it to save an adapter on a layer that is called `lm_head`. The error stops LoRA on wav2vec 2.0.
        """
        return partial(embedding_or_none, self.model.get_input_embeddings)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = False,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that combines others; by default the best approximation of Σ_i weights[i] ΔW_i of their rank.

        Args:
            adapters: names of the adapters to combine. A single adapter is scaled exactly, whatever the type.
            weights: a weight for each adapter, which may be negative.
            adapter_name: name of the new adapter, which is not activated.
            combination_type: "svd", LoRA's default, keeps the rank. "cat" is exact and adds up the ranks; adapters
                that share wavelet, levels and form `subband` keep their subbands, others meet as rows of the
                undecomposed matrix `aa0`. "linear" adds up the factors, `Σ ±√(|weight| scaling) A_i`
                and `Σ √(|weight| scaling) B_i`, as in LoRA. It needs equal layouts and keeps the rank; its result is
                not the sum of the ΔW.
                "svd" and all other types of LoRA ("ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
                "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd") are PEFT's own, computed on the adapters as
                exact LoRAs; the result lies in `aa0`. Modules that an adapter trains in full (`modules_to_save`) are
                not part of the combination.
            svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method: options of
                PEFT's types, as in `LoraModel.add_weighted_adapter`. Without `svd_rank` the rank is the largest R.
                Full matrices, the default there, give the same ΔW and take longer.

        Raises:
            ValueError: an adapter is missing, there already is one of the new name, numbers of adapters and weights
                differ, several adapters train the same module in full, "linear" meets different layouts, one of PEFT's
                types meets unequal ranks or has no `density` in (0, 1], or an adapter has no ΔW.
        """
        options = {
            "svd_rank": svd_rank,
            "svd_clamp": svd_clamp,
            "svd_full_matrices": svd_full_matrices,
            "svd_driver": svd_driver,
            "density": density,
            "majority_sign_method": majority_sign_method,
        }
        with plain_model(self.model):
            combine(self, adapters, weights, adapter_name, combination_type, options)

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: PeftConfig
    ) -> dict[str, Tensor]:
        """Return nothing: `_get_adapter_state_dict` adds the biases, since it knows the adapter's name."""
        return {}

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the tensors to save: the adapter's own, all biases that train, and both embeddings if resized.

        PEFT writes the config next. So this first notes on the config what the model has found out.
        """
        note_for_saving(config, fields_in_model(model, adapter_name))
        warn_of_pad_token(model, config)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return found | saved_besides_factors(model, cast(WaRAConfig, config), adapter_name, state_dict)

    def check_saved_adapter(self, adapter_name: str, path: str | os.PathLike[str], **hub: Any) -> None:
        """Refuse a saved adapter whose tensors would mean something else in the adapter of that name.

        `PeftModel.load_adapter` calls this if the model has an adapter of that name. An adapter that was added for
        these tensors, as `PeftModel.from_pretrained` does, is taken out again if they are refused.

        Raises:
            ValueError: see `wara_peft.injection.loading_over.check_saved_adapter`.
        """
        with self._taken_out_on_error(adapter_name):
            check_saved_adapter(self, adapter_name, path, warned=adapter_name in self._awaited, **hub)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return a tensor's key in an adapter's file, which has the plain model's names; PEFT inverts this to load."""
        return super()._remove_adapter_name_from_key(plain_name(key), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return saved tensors under the model's own keys, whether it is compiled or has further adapters.

        A module is refused if it would get only some of its tensors, or others.
        """
        plain = {plain_name(key): value for key, value in state_dict.items()}
        tuner = next((module for module in model.modules() if isinstance(module, cls)), None)
        with nullcontext() if tuner is None else tuner._taken_out_on_error(adapter_name):
            check_keys(model, adapter_name, plain)
        return keys_in_model(model, super()._remap_adapter_state_dict_for_load(model, config, adapter_name, plain))

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Refuse `save_pretrained(path_initial_model_for_weight_conversion=…)`, which PEFT has for PiSSA and its kind.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "path_initial_model_for_weight_conversion is for adapters that change the base weights when they are "
            "made; WaRA's leave them as they are, so there is nothing to convert: save without it."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one for each sample of the batch, to all adapter layers during a forward or generate.

        PEFT opens this scope around each forward and each generate. Weights do not change during a generate, so
        factors are synthesised twice at most.

        Raises:
            ValueError: the model is training, no layer has an adapter of one of these names, or bare parameters are
                adapted.
        """
        names = kwargs.get("adapter_names")
        with factors_of_one_call(self) if names is None else mixed_batch(self, names, kwargs.get("num_beams") or 1):
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge into the base weights, all or nothing: if one module fails, every weight is as it was before.

        The base weights of the target modules are kept, in main memory, until `unmerge_adapter`.
        """
        check_merge(self.model, adapter_names)
        with undone_on_error(self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self, adapter_names: list[str] | None = None) -> None:
        """Put the base weights back as they were before the adapters were merged, to the bit.

        Args:
            adapter_names: adapters to take out, so that the weights are as if only the others had been merged. None
                means all adapters, those of other methods included.

        Raises:
            ValueError: something else wrote a base weight since. Then no weight of a module is changed, unless
                adapters of several methods lie around the module.
        """
        unmerge(self.model, adapter_names)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT annotates None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = adapted_layers(self.model).values()
        if merge:
            check_merge(self.model, adapter_names)
        with undone_on_error(self.model) if merge else nullcontext():
            unloaded: nn.Module = super()._unload_and_optionally_merge(  # type: ignore[assignment]  # it is annotated None
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        # Reference cycles may keep these layers in memory for a while, and the kept weights would stay with them.
        for layer in layers:
            layer.forget_kept_weight()
        undo_keep_called(self.model)
        stop_observing(self.model)
        return unloaded
