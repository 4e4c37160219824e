"""The layers and bare parameters that a config targets in a model, and which of them can be adapted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import cast

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from ..base_layers.kinds import shape_of, supported_classes
from ..base_layers.never_called import reasons_never_called
from ..base_layers.quantization import FLOATS, adaptable_kind, base_weight
from ..base_layers.refusals import Refusal, reasons_in_words, refusal_message
from ..config import WaRAConfig
from ..forms import Target
from ..layers.lookup import modules_outside
from ..messages import first_few
from .adapter_names import check_saved_apart
from .expected_file import AwaitedAdapter
from .target_checks import (
    check_factors,
    check_in_full,
    check_ranks,
    is_all_linear,
    leave_out_refused,
    reasons_of_other_forwards,
    warn_of_unmatched,
)
from .target_parameters import NamedParameter, check_parameters, named_parameters, projections, use_loras_targets


@dataclass(frozen=True)
class Injection:
    """What a model knows of an adapter while it injects it, besides its config.

    Attributes:
        adapter_name: the adapter's name.
        named: names of modules and parameters that its user has given.
        in_state_dict: the modules named by a state dict from which it is injected, in place of the config's targets;
            None if there is no state dict.
    """

    adapter_name: str = ""
    named: Set[str] = frozenset()
    in_state_dict: Set[str] | None = None


def resolve_targets(model: nn.Module, config: WaRAConfig, injection: Injection) -> None:
    """Resolve targets in the experts of a mixture as PEFT does for LoRA, and "all-linear" to what can be adapted.

    Modules of "all-linear" that cannot be adapted are left out, with a warning; those that the user names are refused
    later.
    """
    all_linear = is_all_linear(config) and injection.in_state_dict is None
    refusals = use_loras_targets(config, model)
    if all_linear:
        modules, _ = _find_targets(model, config, injection)
        refusals |= _refusals(model, config, modules)
        leave_out_refused(config, refusals, list(modules), [name for name, _ in model.named_modules()])
    elif refusals:
        warnings.warn(reasons_in_words(refusals))


def check_injection(
    model: nn.Module, config: WaRAConfig, configs: Mapping[str, WaRAConfig], injection: Injection
) -> None:
    """Check all that is known of an adapter before the first module is replaced, and warn.

    Args:
        model: the model, without the adapter.
        config: the adapter's config, resolved.
        configs: configs of all adapters, this one included, by name.
        injection: what else is known of it.

    Raises:
        TypeError, ValueError: the adapter cannot be added.
    """
    bases = find_and_check_targets(model, config, injection)
    check_saved_apart(model, configs, injection.adapter_name, bases)
    targets = {
        name: Target(shape_of(base), partial(_weight_of, base, name, config, model)) for name, base in bases.items()
    }
    config.form_object.check_targets(config, model, targets)
    shapes = {name: target.shape.as_list() for name, target in targets.items()}
    if targets:  # or else PEFT says that none matches
        warn_of_unmatched(config, shapes, injection.named, [*(name for name, _ in model.named_modules()), *bases])
    if config.module_shapes is not None:
        hashes = config.form_object.base_weight_hashes(config, targets)
        AwaitedAdapter(config, []).warn_if_another({"module_shapes": shapes, "base_weight_hashes": hashes})


def find_and_check_targets(model: nn.Module, config: WaRAConfig, injection: Injection) -> dict[str, nn.Module]:
    """The base layers, and bare parameters, that are to be adapted, by name.

    Raises:
        TypeError: one is of a kind that cannot be adapted.
        ValueError: one cannot be adapted for another reason.
    """
    modules, parameters = _find_targets(model, config, injection)
    refusals = _refusals(model, config, modules)
    if refusals:
        raise ValueError(refusal_message(refusals, modules, config.exclude_modules))
    check_factors(modules)
    check_parameters(config, parameters, modules)
    bases = {**modules, **{parameter.full_name: parameter.bare for parameter in parameters}}
    check_ranks(config, bases)
    check_in_full(config, model, bases)
    return bases


def _find_targets(
    model: nn.Module, config: WaRAConfig, injection: Injection
) -> tuple[dict[str, nn.Module], list[NamedParameter]]:
    """The base layers, by name, and the bare parameters that a config targets; they are of kinds that can be."""
    _maybe_include_all_linear_layers(config, model)
    modules: dict[str, nn.Module] = {}
    parameters: list[NamedParameter] = []
    for name, module in _target_modules(model, config, injection.in_state_dict):
        of_attention = projections(name, module)
        if of_attention:
            parameters += of_attention
        else:
            modules[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    _check_kinds(model, config, modules)
    return modules, [*parameters, *named_parameters(config, model)]


def _target_modules(
    model: nn.Module, config: WaRAConfig, in_state_dict: Set[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are targets, by name, except for those that share the input embedding's adapter."""
    for name, module in modules_outside(model, (BaseTunerLayer,)):
        if not name or BaseTuner._check_tied_module_exists(config, name):
            continue
        if check_target_module_exists(config, name) if in_state_dict is None else name in in_state_dict:
            yield name, module


def _check_kinds(model: nn.Module, config: WaRAConfig, modules: Mapping[str, nn.Module]) -> None:
    only_linear = config.form_object.linear_only or not isinstance(config.init_weights, bool)
    quantization = get_quantization_kwargs(model)
    kinds = {name: adaptable_kind(base, **quantization) for name, base in modules.items()}
    unsupported = [
        f"{name} ({type(modules[name]).__name__})"
        for name, kind in kinds.items()
        if kind is None or (only_linear and not kind.is_linear)
    ]
    if unsupported:
        supported = f"{supported_classes()}, and quantized linear layers"
        if only_linear:
            choice = f"form={config.form!r} and init_weights={config.init_weights!r}"
            supported = f"linear layers (also quantized, and transformers' `Conv1D`) with {choice}"
        raise TypeError(
            f"Target module {first_few(unsupported)} is not supported. WaRA adapts {supported}. Name other modules in "
            "`target_modules`, or leave these out with `exclude_modules`."
        )


def _refusals(model: nn.Module, config: WaRAConfig, modules: dict[str, nn.Module]) -> dict[str, Refusal]:
    """Why some of these base layers cannot be adapted, by name."""
    refusals = reasons_of_other_forwards(modules) | reasons_never_called(model, modules)
    shapes = {name: shape_of(base) for name, base in modules.items() if name not in refusals}
    return refusals | config.form_object.unsuitable(config, model, shapes)


def _weight_of(base_layer: nn.Module, name: str, config: WaRAConfig, model: nn.Module) -> Tensor:
    """The weight of a target, dequantized, from which the form makes first values.

    Raises:
        ValueError: it is quantized, and cannot be dequantized.
    """
    needed = f"form={config.form!r} needs the weight of module {name!r}"
    backend = resolve_quantization_backend(base_layer, **get_quantization_kwargs(model))
    dtype = cast(Tensor, base_layer.weight).dtype
    if backend is None and dtype not in FLOATS:
        raise ValueError(
            f"{needed}, which is quantized, to {dtype}. Use form='subband', or a base model that is not quantized."
        )
    try:
        return base_weight(base_layer, backend)
    except TypeError as error:  # of backends that cannot dequantize
        raise ValueError(
            f"{needed}: {error} Use form='subband', or a base model that is quantized otherwise."
        ) from error
