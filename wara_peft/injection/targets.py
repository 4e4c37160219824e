"""Finds the layers and bare parameters that a config targets in a model, and checks that they can be adapted."""

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
    """Facts about an adapter, besides its config, that are needed only while it is injected.

    Attributes:
        adapter_name: the adapter's name.
        named: names of modules and parameters that the user has given.
        in_state_dict: if the adapter is injected from a state dict, the modules in its keys, which then are the
            targets; None if there is no state dict.
    """

    adapter_name: str = ""
    named: Set[str] = frozenset()
    in_state_dict: Set[str] | None = None


def resolve_targets(model: nn.Module, config: WaRAConfig, injection: Injection) -> None:
    """Resolve a config's targets, in place, for a model.

    Names of layers in a mixture's experts become parameters, as PEFT does it for LoRA. "all-linear" becomes the
    modules that can be adapted, and all others are left out with a warning. A module that the user names is never left
    out: if it cannot be adapted, `find_and_check_targets` refuses it later.
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
    """Check everything about an adapter before the first module is replaced, and give all warnings.

    Args:
        model: the model, without the adapter.
        config: the adapter's config, resolved.
        configs: configs of all adapters, this one included, by name.
        injection: further facts about the adapter.

    Raises:
        TypeError, ValueError: the adapter cannot be added.
    """
    bases = find_and_check_targets(model, config, injection)
    check_saved_apart(model, configs, injection.adapter_name, bases)
    # A weight may have to be dequantized, so `partial` delays that until a form asks for it.
    targets = {
        name: Target(shape_of(base), partial(_weight_of, base, name, config, model)) for name, base in bases.items()
    }
    config.form_object.check_targets(config, model, targets)
    shapes = {name: target.shape.as_list() for name, target in targets.items()}
    if targets:  # if there are none, PEFT itself raises an error
        warn_of_unmatched(config, shapes, injection.named, [*(name for name, _ in model.named_modules()), *bases])
    if config.module_shapes is not None:
        hashes = config.form_object.base_weight_hashes(config, targets)
        AwaitedAdapter(config, []).warn_if_another({"module_shapes": shapes, "base_weight_hashes": hashes})


def find_and_check_targets(model: nn.Module, config: WaRAConfig, injection: Injection) -> dict[str, nn.Module]:
    """Find the base layers and bare parameters that are to be adapted, by name.

    Raises:
        TypeError: a target is of a kind that cannot be adapted.
        ValueError: a target cannot be adapted for another reason.
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
    """Find the base layers, by name, and the bare parameters that a config targets.

    Raises:
        TypeError: a base layer is of a kind that cannot be adapted.
    """
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
    """Find the target modules, by name, except for those that are tied to the input embedding and use its adapter."""
    for name, module in modules_outside(model, (BaseTunerLayer,)):
        # The model itself, without a name, has no parent in which it could be replaced.
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
    """Find the base layers that cannot be adapted; give the reasons by name."""
    refusals = reasons_of_other_forwards(modules) | reasons_never_called(model, modules)
    shapes = {name: shape_of(base) for name, base in modules.items() if name not in refusals}
    return refusals | config.form_object.unsuitable(config, model, shapes)


def _weight_of(base_layer: nn.Module, name: str, config: WaRAConfig, model: nn.Module) -> Tensor:
    """Give the dequantized weight of a target, from which the form makes first values.

    Raises:
        ValueError: the weight is quantized, and cannot be dequantized.
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
    except TypeError as error:  # from backends that cannot dequantize
        raise ValueError(
            f"{needed}: {error} Use form='subband', or a base model that is quantized otherwise."
        ) from error
