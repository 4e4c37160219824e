"""Cuts an adapter to some of its components. A component is a row of A_s with its column of B_s, one unit of rank."""

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
"""Indices of components, by module and by subband."""


def config_of(model: nn.Module, adapter_name: str) -> WaRAConfig:
    """Give an adapter's config, as `wara_config` does, and refuse an adapter whose components cannot be told apart.

    Raises:
        ValueError: the adapter's form has no separate pairs for each subband, it adapts bare parameters, or see
            `wara_config`.
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
    """Count the parameters of a component of this level: n_j times the kernel's size for its row, plus m_j."""
    # One parameter holds the rows of all subbands of a level, since these have the same length.
    rows, columns = (factor.get_parameter(f"level{level}") for factor in layer.factors(adapter_name))
    return rows[0].numel() + len(columns)


def subband_of(factor: SubbandFactor, row: int, level: int) -> tuple[str, int]:
    """Find the subband to which a row of a level's parameter belongs, and the row's index within that subband."""
    for name, rank in factor.ranks.items():
        if Subband.named(name).level == level:
            if row < rank:
                return name, row
            row -= rank
    raise IndexError(row)


@on_plain_model
@torch.no_grad()
def keep_components(model: nn.Module, adapter_name: str, kept: Kept) -> None:
    """Cut an adapter to some of its components, in place. ΔW becomes what it would be if all others were zero.

    The scaling of each module stays the same. A module that keeps no component loses the adapter; if it has no other
    adapter, its base layer comes back. The adapter gets a new config with the new ranks, so that it saves, loads,
    exports and merges like any other. Its parameters are new tensors: an optimizer made before does not update them.

    Args:
        model: a model with the adapter.
        adapter_name: the adapter's name.
        kept: for each module, by its name in the config, and for each subband, the indices of the components to keep,
            in their new order. All others are cut.

    Raises:
        ValueError: the adapter is merged, has another form, or nothing would be left; or a module, subband or index
            does not exist or comes twice. Nothing is changed then.
        TypeError: the adapter is no WaRA adapter.
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
        # "wara_only" saves the biases of adapted layers. A layer that loses the adapter keeps its trained bias, which
        # only "all" saves.
        changed.bias = "all"
    shapes, biased = changed.module_shapes or {}, changed.biased_modules
    # Layers note how the model has resolved the config; the changed config needs such a note too.
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
        # A tied layer uses the factors of another layer, and has no entry of its own in `ranks`.
        source = layer.tied_to.get(adapter_name, layer)
        if not any(ranks[source.module_name].values()):
            _take_out(model, name, layer, adapter_name)
            continue
        layer.in_model[adapter_name] = in_model
        if source is not layer:
            layer.tie_again(source)  # its references are still to the old factors


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
    # A scale that the user has set by `set_scale` outlives the cut, though r and alpha change.
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
