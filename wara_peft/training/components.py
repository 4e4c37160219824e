"""Components of an adapter: a row of A_s with the column of B_s, the unit by which its rank grows and shrinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft.utils import _get_submodules
from torch import nn

from ..compiled import on_plain_model
from ..config import WaRAConfig
from ..config_fields.resolution import note_resolution, take_back_resolution
from ..forms import SubbandFactor
from ..layers.base import WaRALayer
from ..layers.lookup import adapted_layers, base_model_of, layers_of, wara_config
from ..wavelet import Subband

Kept = Mapping[str, Mapping[str, Sequence[int]]]
"""Indices of components, by module and subband."""


def config_of(model: nn.Module, adapter_name: str) -> WaRAConfig:
    """As `wara_config`, of an adapter whose components can be told apart.

    Raises:
        ValueError: its subbands have no pairs of their own, it is of bare parameters, or see `wara_config`.
    """
    config = wara_config(model, adapter_name)
    if not config.form_object.keeps_subbands:
        raise ValueError(
            f"Adapter {adapter_name!r} is of form={config.form!r}, in which a subband has no pairs of its own that "
            "could be left out. Use form='subband'."
        )
    parameters = [repr(name) for name, layer in layers_of(model, adapter_name).items() if layer.kind.is_parameter]
    if parameters:
        raise ValueError(
            f"Adapter {adapter_name!r} is of bare parameters, such as {parameters[0]}, all experts of which have one "
            "rank. Choose ranks beforehand by `r` and `rank_pattern`, or leave parameters out of `target_parameters`."
        )
    return config


def parameters_of_component(layer: WaRALayer, adapter_name: str, level: int) -> int:
    """Parameters of a component of that level: n_j times the kernel's size, and m_j."""
    rows, columns = (factor.get_parameter(f"level{level}") for factor in layer.factors(adapter_name))
    return rows[0].numel() + len(columns)


def subband_of(factor: SubbandFactor, row: int, level: int) -> tuple[str, int]:
    """The subband that a row of a level's parameter belongs to, and its index among the subband's own."""
    for name, rank in factor.ranks.items():
        if Subband.named(name).level == level:
            if row < rank:
                return name, row
            row -= rank
    raise IndexError(row)


@on_plain_model
@torch.no_grad()
def keep_components(model: nn.Module, adapter_name: str, kept: Kept) -> None:
    """Cut an adapter to some of its components, in place: ΔW is what it would be with the others zero.

    Each module's scaling stays what it is. A module without components loses the adapter, and its base layer comes
    back if it has no other one. The tuner gets another config for it, so that the adapter saves, loads, exports and
    merges as any other. Parameters are new ones: an optimizer made before does not know them.

    Args:
        model: a model with the adapter.
        adapter_name: its name.
        kept: for each module, by its name in the config, and for each subband, indices of components in the order in
            which they shall stand. What is left out is cut.

    Raises:
        ValueError: the adapter is merged, has another form, or nothing would be left; or a module, subband or index
            does not exist or comes twice. Nothing is changed then.
        TypeError: it is no WaRA adapter.
    """
    config = config_of(model, adapter_name)
    layers = layers_of(model, adapter_name)
    _check(layers, adapter_name, kept)
    ranks = {
        name: {band: len(kept.get(name, {}).get(band, ())) for band in layer.factors(adapter_name)[0].ranks}
        for name, layer in layers.items()
    }
    changed = config.with_ranks(ranks, [name for name, _ in base_model_of(model).named_modules()])
    gone = [layer.get_base_layer() for name, layer in layers.items() if not any(ranks[name].values())]
    if changed.bias == "wara_only" and any(getattr(base, "bias", None) is not None for base in gone):
        changed.bias = "all"  # or those that have trained would not be saved
    shapes, biased = changed.module_shapes or {}, changed.biased_modules
    found = {
        "module_shapes": shapes,
        "base_weight_hashes": None,
        "biased_modules": None if biased is None else [name for name in biased if name in shapes],
    }
    in_model = note_resolution(changed, take_back_resolution(changed), found)
    cast(Any, model).peft_config[adapter_name] = changed
    for name, layer in layers.items():
        if any(ranks[name].values()):
            _cut(layer, adapter_name, changed, kept[name])
    for name, layer in adapted_layers(model, adapter_name).items():
        source = layer.tied_to.get(adapter_name, layer)
        if not any(ranks[source.module_name].values()):
            _take_out(model, name, layer, adapter_name)
            continue
        layer.in_model[adapter_name] = in_model
        if source is not layer:
            layer.tie_again(source)


def _check(layers: dict[str, WaRALayer], adapter_name: str, kept: Kept) -> None:
    for name, of_module in kept.items():
        if name not in layers:
            raise ValueError(f"Module {name!r} has no adapter {adapter_name!r}; it is in {', '.join(layers)}.")
        ranks = layers[name].factors(adapter_name)[0].ranks
        for band, indices in of_module.items():
            there = ranks.get(band, 0)
            if len(set(indices)) < len(indices) or not all(0 <= index < there for index in indices):
                raise ValueError(
                    f"Subband {band!r} of module {name!r} has {there} components; {list(indices)} names others, or "
                    "one twice."
                )
    if not any(indices for of_module in kept.values() for indices in of_module.values()):
        raise ValueError(f"No component of adapter {adapter_name!r} would be left.")
    merged = [repr(name) for name, layer in layers.items() if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(f"Adapter {adapter_name!r} is merged into module {merged[0]}. Unmerge it first.")


def _cut(layer: WaRALayer, adapter_name: str, config: WaRAConfig, kept: Mapping[str, Sequence[int]]) -> None:
    old = layer.factors(adapter_name)
    scaled_by = layer.scaling[adapter_name] / layer.initial_scaling(adapter_name)
    ranks = config.ranks_of(layer.module_name)
    parts = layer.forms[adapter_name].create(config, layer.module_name, layer.shape, ranks)
    for container, before in zip(("wara_A", "wara_B"), old, strict=True):
        new = parts[container].to(device=next(before.parameters()).device, dtype=before.dtype)
        for band in new.ranks:
            chosen = torch.tensor(kept[band], device=next(before.parameters()).device)
            new.subband(band).copy_(before.subband(band).index_select(1 - before.dim, chosen))
        new.requires_grad_(next(before.parameters()).requires_grad)
        new.train(before.training)
        getattr(layer, container)[adapter_name] = new
    layer.r[adapter_name] = layer.total_rank(adapter_name)
    alpha = config.alpha_of(layer.module_name)
    layer.wara_alpha[adapter_name] = layer.r[adapter_name] if alpha is None else alpha
    layer.set_scale(adapter_name, scaled_by)


def _take_out(model: nn.Module, name: str, layer: WaRALayer, adapter_name: str) -> None:
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        container = getattr(layer, attribute)
        if adapter_name in container:
            del container[adapter_name]
    if not layer.wara_A:
        parent, _, child = _get_submodules(model, name)
        setattr(parent, child, layer.get_base_layer())
