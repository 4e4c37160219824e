"""Loads a saved LoRA as a WaRA adapter, which computes the same as the LoRA and can train further with subbands."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper, set_peft_model_state_dict
from torch import nn

from ..arguments import check_argument
from ..base_layers.kinds import ModuleShape, kind_of, shape_of
from ..base_layers.tied_weights import modules_by_parameter
from ..compiled import compiled_module, plain_model
from ..config import WaRAConfig
from ..config_fields.from_lora import fields_from_lora, warn_of_left_out
from ..config_fields.name_patterns import matches
from ..disk.adapters.lora import SavedLora
from ..layers.lookup import without_wrappers
from ..model import WaRAModel


def load_lora(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", **fields: Any
) -> PeftModel:
    """Add a WaRA adapter of `form="subband"` whose undecomposed pair `aa0` is a saved LoRA.

    ΔW = scaling · (B A + Σ_s S_out,s B_s A_s S_in,sᵀ)

    A, B and scaling are the LoRA's in every module, also if they come from its patterns or rsLoRA. A_s and B_s are new
    pairs of the subbands s, and their product is zero until they train. Modules that the LoRA trained in full, biases
    and tokens are loaded too.

    Args:
        model: the base model of the LoRA, or a `PeftModel` with WaRA adapters of it, which gets one more.
        path: the LoRA's directory (`adapter_config.json`, `adapter_model.safetensors`).
        adapter_name: name of the new adapter. In a `PeftModel` it is not activated, just as with `add_adapter`.
        fields: fields of `WaRAConfig`, such as `wavelet` and `levels`. `r` or `subband_ranks` are the ranks of the
            subbands beside the LoRA; if all of them are 0, the adapter is only the LoRA. All fields that are not given
            here come from the LoRA.

    Returns:
        The model with the adapter. It trains, unless `inference_mode=True` is given.

    Raises:
        FileNotFoundError: the directory or one of the files is missing.
        ValueError: the directory holds no LoRA, or one that WaRA cannot compute (DoRA and other variants, convolutions
            with groups, dilation or another padding mode than zeros, base weights that its initialisation changed);
            its file does not fit its config or the model; or `fields` sets a field that the LoRA determines. Nothing
            is changed then.
        TypeError: the LoRA adapts modules of a kind that WaRA does not adapt.

    Warns:
        UserWarning: the LoRA has settings that WaRA does not have, or two of its patterns match one module and their
            order in training is unknown.
    """
    call = "load_lora(model, path, adapter_name)"
    check_argument(call, "model", model, "an nn.Module")
    check_argument(call, "path", path, "a str or os.PathLike")
    check_argument(call, "adapter_name", adapter_name, "a str")
    saved = SavedLora(path)
    config = _config(saved.config, fields)
    adapted = compiled_module(model)
    with plain_model(adapted.get_base_model() if isinstance(adapted, PeftModel) else model) as base:
        targets = WaRAModel.targets_of(base, config)
        shapes = {name: shape_of(target) for name, target in targets.items()}
        _check_targets(targets, shapes)
        tied = _tied_to(targets, base) if config.ensure_weight_tying else set()
        state_dict = saved.state_dict(shapes, tied, _in_full(config, base), _shapes_in(base))
    # All checks are done; only now the model changes.
    _warn_of_lost_order(saved, targets)
    if isinstance(adapted, PeftModel):
        adapted.add_adapter(adapter_name, config)
    else:
        adapted = get_peft_model(model, config, adapter_name)
    # The LoRA's tensors replace those of `aa0`. The subbands' first values go along, because an adapter refuses to
    # load only some of a module's tensors.
    own = get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
    set_peft_model_state_dict(adapted, own | state_dict, adapter_name)
    return adapted


def _config(lora: LoraConfig, fields: dict[str, Any]) -> WaRAConfig:
    ranks = fields.get("subband_ranks") or {}
    of_lora = {"rank_pattern", "wara_alpha", "alpha_pattern", "use_rslora"} & fields.keys()
    if of_lora or "aa0" in ranks or fields.get("form", "subband") != "subband":
        names = ", ".join(sorted(of_lora)) or ("aa0" if "aa0" in ranks else f"form={fields['form']!r}")
        raise ValueError(
            f"{names} cannot be given to load_lora, which takes the rank of `aa0` and all scalings from the LoRA. "
            "`r` and `subband_ranks` are the ranks of the subbands beside it."
        )
    if fields.get("init_weights", True) is False:
        raise ValueError("init_weights=False would change what the LoRA computes. Leave it out.")
    # First values are irrelevant for a LoRA that has been trained.
    trained = copy.copy(lora)
    trained.init_lora_weights = True
    trained.eva_config = trained.corda_config = trained.lora_ga_config = None
    beside = {name: fields[name] for name in ("r", "levels") if name in fields}
    settings = WaRAConfig(**beside, subband_ranks={**ranks, "aa0": 1})
    own, left_out = fields_from_lora(
        trained, lambda rank: {**settings.ranks_of(""), "aa0": rank}, WaRAConfig.__dataclass_fields__
    )
    warn_of_left_out(left_out, "load_lora")
    own |= {"r": settings.r, "inference_mode": False}
    return WaRAConfig(**{**own, **fields, "subband_ranks": own["subband_ranks"]})


def _check_targets(targets: Mapping[str, nn.Module], shapes: Mapping[str, ModuleShape]) -> None:
    """Refuse targets on which LoRA computes differently from WaRA, or has factors of another shape."""
    for name, target in targets.items():
        if shapes[name].kind.is_parameter:
            raise ValueError(f"{name!r} is a bare parameter, whose LoRA cannot be loaded; adapt it by `WaRAConfig`.")
        settings = shapes[name].kind.settings_lora_ignores(target)
        if shapes[name].groups > 1 or settings:
            said = ", ".join(f"{key}={value!r}" for key, value in {"groups": shapes[name].groups, **settings}.items())
            raise ValueError(
                f"The convolution {name!r} has {said}: PEFT's LoRA has A for all groups at once, and computes without "
                "dilation and padding mode, which WaRA does not. Add a new adapter by `WaRAConfig`."
            )


def _warn_of_lost_order(saved: SavedLora, names: Iterable[str]) -> None:
    """Warn if two patterns give a module different alphas: PEFT sorts patterns in the file, so their order is lost."""
    alphas: Mapping[str, float] = saved.config.alpha_pattern or {}
    for name in names:
        found = [pattern for pattern in alphas if matches(pattern, name, "alpha_pattern")]
        other = next((pattern for pattern in found if alphas[pattern] != alphas[found[0]]), None)
        if other is not None:
            warnings.warn(
                f"alpha_pattern of the LoRA in {str(saved.path)!r} has {found[0]!r} and {other!r}, which both match "
                f"{name!r}. PEFT sorts them when it saves, so that it is lost which one counted in training. The "
                f"first in the file, {found[0]!r}, counts now, as where PEFT loads it. If it was the other one, put "
                "that first in `adapter_config.json`.",
                stacklevel=3,
            )
            return


def _tied_to(targets: Mapping[str, nn.Module], model: nn.Module) -> set[str]:
    """Find the layers that share the weight of a target embedding and are no targets themselves; give their names."""
    users = modules_by_parameter(model)
    embeddings = [target for target in targets.values() if kind_of(target).has_vocabulary]
    tied = {without_wrappers(user) for target in embeddings for user in users[id(target.weight)]}
    return tied - targets.keys()


def _in_full(config: WaRAConfig, model: nn.Module) -> set[str]:
    """Give the keys of all tensors that `modules_to_save` trains; like PEFT, compare its names with ends of names."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if name.endswith(tuple(config.modules_to_save or ()))
        for key in (module.original_module if isinstance(module, ModulesToSaveWrapper) else module).state_dict()
    }


def _shapes_in(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Give the shapes of parameters and buffers, by the names that they have in the model without adapters."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    # Under DeepSpeed's stage 3 a parameter is empty between uses, and `ds_shape` is the shape of the whole.
    return {without_wrappers(name): tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in named}
