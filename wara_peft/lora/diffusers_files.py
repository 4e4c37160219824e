"""Writes LoRAs for a diffusion pipeline into one file, under the keys that diffusers loads.

A pipeline consists of several models, its components. diffusers keeps their LoRAs in one file,
`pytorch_lora_weights.safetensors`. Each key begins with the name of its component; diffusers ignores keys without such
a name. (diffusers saves WaRA adapters in a file of the same name; `disk/component_file.py` reads it.) No other module
imports diffusers, and this one does so only when it is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from ..disk.adapters.contents import PEFT_PREFIX
from ..disk.adapters.source import AdapterSource
from ..messages import first_few

TEXT_ENCODER = "text_encoder"


def component_of(source: AdapterSource, component: str | None = None) -> str:
    """Determine to which component of a pipeline an adapter belongs, and check that diffusers can load its LoRA.

    Args:
        source: the adapter.
        component: the component's name; None derives it from the class of the adapter's base model, which works for
            UNets, diffusion transformers and `CLIPTextModel`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the class does not tell the component; no pipeline loads LoRAs into a component of this name; the
            class contradicts the name; the adapter has modules of several components; or it holds tensors that
            diffusers does not load.
    """
    known = sorted(set().union(*_pipelines()))
    if component == "transformer_2":
        raise ValueError(
            "component='transformer_2': pipelines look for it under the keys of 'transformer'. Give "
            "component='transformer', and load with load_lora_weights(..., load_into_transformer_2=True)."
        )
    if component is not None and component not in known:
        raise ValueError(
            f"component={component!r} is none that a pipeline of diffusers loads a LoRA into; those are "
            f"{', '.join(known)}."
        )
    # An adapter of a whole pipeline, put into one module, has names such as "unet.down_blocks.0".
    mixed = sorted({name.partition(".")[0] for name in source.modules}.intersection(known))
    if len(mixed) > 1:
        raise ValueError(
            f"The adapter has modules of {' and '.join(map(repr, mixed))}, which diffusers loads as LoRAs of their "
            "own. Adapt each component by itself, and export them together: {component: adapter, ...}."
        )
    kind, told = _kind(source)
    told = told or source.component
    if component is None and told is None:
        of = source.base_class[0] if source.base_class else "a model that its config does not name"
        raise ValueError(
            f"The adapter is of {of}, by which the component of the pipeline cannot be told. Name it, as "
            f"component='unet' (on the command line --component unet); it is one of {', '.join(known)}."
        )
    if component is not None and kind is not None and not component.startswith(kind):
        assert source.base_class is not None
        raise ValueError(
            f"component={component!r} was named, but the adapter is of {source.base_class[0]}, which is a {kind} of "
            "a pipeline."
        )
    chosen = component or str(told)
    _check_loadable(source, chosen)
    return chosen


def check_together(components: Iterable[str]) -> None:
    """Refuse components that no single pipeline has together.

    Raises:
        ValueError: no pipeline loads LoRAs into all of them, or one comes twice.
    """
    chosen = sorted(components)
    twice = [repr(name) for name in chosen if chosen.count(name) > 1]
    if twice:
        raise ValueError(
            f"Two adapters are of the component {twice[0]}, of which a file holds one. Export them into directories "
            "of their own, and let the pipeline load both: set_adapters."
        )
    if not any(set(chosen) <= components for components in _pipelines()):
        raise ValueError(
            f"No pipeline of diffusers loads LoRAs into {' and '.join(map(repr, chosen))} together. Export them into "
            "directories of their own."
        )


def write_components(directory: Path, loras: Mapping[str, tuple[LoraConfig, Mapping[str, Tensor]]]) -> None:
    """Write LoRAs, by component, as `pytorch_lora_weights.safetensors` into an existing directory.

    The file's metadata (`lora_adapter_metadata`) holds the config of each LoRA, from which diffusers restores it.
    """
    mixin = _lora_base()
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, (config, state_dict) in loras.items():
        keys = {key.removeprefix(PEFT_PREFIX): value for key, value in state_dict.items()}
        if component.startswith(TEXT_ENCODER):
            keys = _of_text_encoder(keys)
        tensors |= mixin.pack_weights(keys, component)
        # The metadata is JSON, which has no sets.
        fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        metadata |= mixin.pack_weights(fields, component)
    mixin.write_lora_layers(
        tensors,
        str(directory),
        is_main_process=True,
        weight_name=None,
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata=metadata,
    )


def _of_text_encoder(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys to diffusers' own for text encoders.

    diffusers' converter renames only the keys of attention, so all others are renamed here.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

    converted: dict[str, Tensor] = convert_state_dict_to_diffusers(state_dict)
    for side, direction in (("lora_A", "down"), ("lora_B", "up")):
        converted = {
            key.replace(f".{side}.weight", f".lora_linear_layer.{direction}.weight"): value
            for key, value in converted.items()
        }
    return converted


def _kind(source: AdapterSource) -> tuple[str | None, str | None]:
    """Say what the class of the base model tells: the beginning of the component's name, and the name itself.

    Each is None if the class does not tell it.
    """
    if source.config.task_type is not None:
        raise ValueError(
            f"The adapter was trained for the task {source.config.task_type}, and a diffusion pipeline has no "
            "component for that. Export it in PEFT's format (format='peft')."
        )
    if source.base_class is None:
        return None, None
    name, module = source.base_class
    # transformers names models with a head after their task, as in "BertForSequenceClassification".
    if re.search("For[A-Z]", name) and module.startswith("transformers."):
        raise ValueError(
            f"The adapter is of {name}, a model with a head for its task, and no component of a diffusion pipeline. "
            "Export it in PEFT's format (format='peft')."
        )
    if module.startswith("diffusers.models.unets.") and "UNet" in name:
        return "unet", "unet"
    if module.startswith("diffusers.models.transformers."):
        return "transformer", "transformer"
    if module.startswith("transformers."):
        # A class such as T5EncoderModel is text_encoder in some pipelines, and text_encoder_2 or _3 in others.
        return TEXT_ENCODER, TEXT_ENCODER if name == "CLIPTextModel" else None
    return None, None


def _check_loadable(source: AdapterSource, component: str) -> None:
    """Refuse an adapter of which diffusers would load nothing, or only a part."""
    if source.others:
        others = [repr(key.removeprefix(PEFT_PREFIX)) for key in source.others]
        raise ValueError(
            f"diffusers loads LoRAs alone, not what this adapter holds in full ({first_few(others)}). Export it in "
            "PEFT's format (format='peft'), or train it without."
        )
    images = [repr(name) for name in source.modules if re.search(r"(^|\.)(vision|visual)", name)]
    if component.startswith(TEXT_ENCODER) and images:
        raise ValueError(
            f"The adapter has modules that see images ({first_few(images)}), which no text encoder has. Adapt the "
            "text encoder alone."
        )
    if component.startswith(TEXT_ENCODER) and not any(shape.kind.is_linear for shape in source.modules.values()):
        raise ValueError(
            f"diffusers loads no LoRA of a text encoder that is not of linear layers too, and this one is of "
            f"{first_few([repr(name) for name in source.modules])}. Export it in PEFT's format (format='peft')."
        )


def _pipelines() -> list[set[str]]:
    """List, for each of diffusers' kinds of pipelines, the components into which it loads LoRAs."""
    # diffusers has no public list. `_lora_loadable_modules` is the one that its own loaders go by.
    base = _lora_base()
    from diffusers.loaders import lora_pipeline

    loaders: list[Any] = [
        item for item in vars(lora_pipeline).values() if isinstance(item, type) and issubclass(item, base)
    ]
    return [set(loader._lora_loadable_modules) - {"transformer_2"} for loader in loaders]


def _lora_base() -> Any:
    try:
        from diffusers.loaders.lora_base import LoraBaseMixin
    except ImportError as error:
        raise ImportError(f"format='diffusers' needs diffusers: pip install diffusers ({error}).") from error
    return LoraBaseMixin
