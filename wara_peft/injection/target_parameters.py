"""Finds the bare parameters that a config targets, by PEFT's rules for LoRA, and checks and adapts them.

A bare parameter is a weight that is not in a layer of its own, such as the stacked matrices of a mixture's experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn

from ..base_layers.kinds import IN_PROJ, LINEAR, BareParameter, Kind, known_kind
from ..base_layers.quantization import FLOATS
from ..base_layers.refusals import Refusal
from ..config import WaRAConfig
from ..layers.lookup import modules_outside
from ..layers.parameters import AdaptedModule, ParameterLayer
from ..messages import first_few
from .target_checks import is_all_linear

_LOST = (
    "PEFT takes the names of target module {} for those of experts, whose parameters it adapts in their place: "
    "neither its LoRA nor WaRA adapts dense layers and shared experts of such models."
)


@dataclass(frozen=True)
class NamedParameter:
    """A bare parameter that a config targets.

    Attributes:
        module_name: the name in the model of the module whose forward reads the parameter.
        module: this module, or the wrapper that adapters have put in its place.
        name: the parameter's name in the module that owns it.
        inside: the name, within `module`, of the submodule that owns the parameter; "" if `module` itself owns it.
        kind: the kind of base layer that the parameter is; None derives it from the parameter's shape.
    """

    module_name: str
    module: nn.Module
    name: str
    inside: str = ""
    kind: Kind | None = None

    @property
    def child_name(self) -> str:
        """The name of the parameter's adapter layer, which is a child of the wrapper around the module."""
        return self.inside or self.name

    @property
    def full_name(self) -> str:
        return f"{self.module_name}.{self.child_name}"

    @property
    def owner(self) -> nn.Module:
        """The module that owns the parameter."""
        return module_without_adapters(self.module).get_submodule(self.inside)

    @property
    def bare(self) -> BareParameter:
        """The parameter, presented as a layer with a weight."""
        return BareParameter(self.owner, self.name, self.kind, self.inside)


def module_without_adapters(module: nn.Module) -> nn.Module:
    """Give the original module, without the wrappers that adapters have put around it."""
    while isinstance(module, (BaseTunerLayer, AdaptedModule)):
        module = module.base_layer
    return module


def projections(module_name: str, module: nn.Module) -> list[NamedParameter]:
    """List the weights of an `nn.MultiheadAttention`: one for q, k and v together, and one for the output.

    Its forward reads both weights itself, and calls no layer that could be replaced. For other modules the list is
    empty.

    Raises:
        ValueError: keys or values have another width than queries, so that q, k and v have no common weight.
    """
    attention = module_without_adapters(module)
    if not isinstance(attention, nn.MultiheadAttention):
        return []
    # PyTorch sets this private flag where it chooses between one weight for q, k, v and three.
    if not attention._qkv_same_embed_dim:
        raise ValueError(
            f"Target module {module_name!r} is an nn.MultiheadAttention with kdim={attention.kdim} and vdim="
            f"{attention.vdim} beside embed_dim={attention.embed_dim}, whose projections have no weight in common. "
            "Leave it out with `exclude_modules`."
        )
    return [
        NamedParameter(module_name, module, "in_proj_weight", kind=IN_PROJ),
        NamedParameter(module_name, module, "weight", inside="out_proj", kind=LINEAR),
    ]


def adapt_parameter(
    parameter: NamedParameter, model: nn.Module, config: WaRAConfig, adapter_name: str, trains: bool
) -> None:
    """Add an adapter to a bare parameter of the model; the adapter is frozen unless `trains`."""
    # Looked up again: another parameter of the same module may have put the wrapper there by now.
    module = model.get_submodule(parameter.module_name)
    if not isinstance(module, AdaptedModule):
        parent, _, child_name = parameter.module_name.rpartition(".")
        module = AdaptedModule(module)
        setattr(model.get_submodule(parent), child_name, module)
    layer = module.layers.get(parameter.child_name)
    if layer is not None:
        layer.update_layer(adapter_name, config, parameter.full_name)
        return
    layer = ParameterLayer(parameter.bare, adapter_name, parameter.full_name, config)
    if not trains:
        layer.requires_grad_(False)
    setattr(module, parameter.child_name, layer)


def use_loras_targets(config: WaRAConfig, model: nn.Module) -> dict[str, Refusal]:
    """Change a config, in place, to target the same parameters in a mixture's experts as PEFT's LoRA would.

    Recent transformers keep in one parameter the matrices that once were a linear layer in each expert. There PEFT's
    LoRA reads "all-linear", and names of the former layers such as `w1` or `gate_proj`, as names of these parameters,
    router included. It doubles rank and alpha where two layers became one parameter. This function hands PEFT a LoRA's
    config with the same targets, and copies what PEFT makes of it.

    Args:
        config: the config. That of a saved adapter already names the parameters, and stays.
        model: the model.

    Returns:
        By name, why some parameters and layers are not targeted: parameters that "all-linear" includes and this form
        does not adapt, and linear layers that LoRA leaves out.

    Raises:
        ValueError: the config names one of two layers that became one parameter, but not the other.
    """
    if config.module_shapes is not None:
        return {}
    # PEFT itself imports this only when needed: the import is slow, and needs transformers 5.
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    # With r = alpha = 1 the ranks and alphas in the patterns that PEFT adds are the factors by which to multiply ours.
    lora = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        target_parameters=config.target_parameters,
        task_type=config.task_type,
    )
    before = lora.target_modules
    linear = _linear_layers(lora, model)
    convert_peft_config_for_transformers(lora, model=model, conversions=None)
    if not lora.target_parameters or lora.target_modules == before:
        return {}
    reason = _reason_of_config(config) if is_all_linear(config) else None
    config.target_modules = lora.target_modules
    lost = {name: Refusal(_LOST) for name in sorted(linear - _linear_layers(lora, model))}
    named, config.target_parameters = config.target_parameters, sorted(lora.target_parameters)
    if reason is not None:
        found = {parameter.full_name: Refusal(f"{{}}, {reason}") for parameter in named_parameters(config, model)}
        config.target_parameters = named
        return found | lost
    # Copies, since the user may use the same dicts in another config.
    config.rank_pattern, config.alpha_pattern = copy.copy(config.rank_pattern), copy.copy(config.alpha_pattern)
    for pattern, times in (lora.rank_pattern or {}).items():
        every = {name: rank * times for name, rank in config.ranks_of("").items()}
        config.rank_pattern.setdefault(pattern, every if config.subband_ranks else config.r * times)
        if config.wara_alpha is not None:
            config.alpha_pattern.setdefault(pattern, config.wara_alpha * times)
    return lost


def _linear_layers(lora: LoraConfig, model: nn.Module) -> set[str]:
    """Give the names of the linear layers of the model that a config targets."""
    # PEFT resolves "all-linear" in the config that it is given.
    resolved = _maybe_include_all_linear_layers(copy.copy(lora), model)
    return {
        name
        for name, module in model.named_modules()
        if (kind := known_kind(module)) and kind.is_linear and check_target_module_exists(resolved, name)
    }


def named_parameters(config: WaRAConfig, model: nn.Module) -> Iterator[NamedParameter]:
    """Find the parameters that `target_parameters` names, in full or by the end of the name, in the model's order."""
    targets = tuple(config.target_parameters or ())
    if not targets:
        return
    ends = tuple(f".{target}" for target in targets)
    for module_name, module in modules_outside(model, (BaseTunerLayer, AdaptedModule)):
        found = NamedParameter(module_name, module, "")
        # A parametrized parameter, such as a quantized one, is not among `_parameters`.
        for name in [*found.owner._parameters, *getattr(found.owner, "parametrizations", ())]:
            full_name = f"{module_name}.{name}"
            is_there = found.owner._parameters.get(name, module) is not None
            if is_there and (full_name in targets or full_name.endswith(ends)):
                yield NamedParameter(module_name, module, name)


def check_parameters(config: WaRAConfig, parameters: list[NamedParameter], targets: Iterable[str]) -> None:
    """Refuse parameters, and settings with parameters, that cannot be adapted.

    Args:
        config: the config.
        parameters: the parameters that the config names.
        targets: names of the modules that the config adapts.

    Raises:
        ValueError: the config's form or `init_weights` does not support parameters, or one of the parameters is none
            by which its module just multiplies.
    """
    if not parameters:
        return
    names = first_few([repr(parameter.full_name) for parameter in parameters])
    reason = _reason_of_config(config)
    if reason is not None:
        raise ValueError(f"{names}, {reason}")
    targets = list(targets)
    for parameter in parameters:
        reason = _reason_against(parameter, targets)
        if reason is not None:
            raise ValueError(f"The parameter {parameter.full_name!r} cannot be adapted: {reason}")


def _reason_of_config(config: WaRAConfig) -> str | None:
    """Say why a config can adapt no bare parameters; None if it can."""
    if not config.form_object.adapts_parameters or not isinstance(config.init_weights, bool):
        return (
            f"bare parameters, are not adapted by form={config.form!r} with init_weights={config.init_weights!r}: use "
            "form='subband' with True or False, or leave them out."
        )
    return None


def _reason_against(parameter: NamedParameter, targets: list[str]) -> str | None:
    """Say why a parameter cannot be adapted; None if it can."""
    owner, module_name = parameter.owner, parameter.module_name
    if not module_name:
        return "it belongs to the model itself, and not to one of its modules. Put the model into another module."
    is_layer = isinstance(parameter.module, BaseTunerLayer) or known_kind(owner)
    if is_layer and not parameter.inside:
        return f"it is the weight of a layer. Name the layer, {module_name!r}, in `target_modules`."
    if parameter.name not in (*owner._parameters, *getattr(owner, "parametrizations", ())):
        return "it is computed from other tensors, as by `torch.nn.utils.weight_norm`. Take that off first."
    bare = parameter.bare
    if bare.dtype not in FLOATS:
        return f"it is quantized, to {bare.dtype}. Adapt the model that is not quantized."
    if len(bare.shape) not in (2, 3):
        stacks = "(experts, out, in) or (experts, in, out)"
        return f"its shape is {bare.shape}. It must be (out, in) or, for experts, {stacks}."
    if getattr(owner, "_is_expert_parallel", False):
        return "its experts are spread over processes. Load the model without expert parallelism."
    nested = [target for target in targets if target.startswith(f"{module_name}.")]
    if nested:
        return f"a module inside of {module_name!r} is adapted too, {nested[0]!r}. Name one of the two."
    return None
