"""LoRAs of a diffusion pipeline's components, in one file under the keys by which diffusers loads them.

A pipeline is several models, its components. diffusers keeps their LoRAs in `pytorch_lora_weights.safetensors`, each
key after the name of the component that it is of, and takes no notice of keys without such a name. (What it saves of
WaRA adapters in a file of that name is read by `disk/component_file.py`.) This is the one module that imports
diffusers, when it is called.
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
    """The component that an adapter is of, as the class of its base model has it, compared with the one that is named.

    Args:
        source: the adapter.
        component: its name in the pipeline; None asks the class, which says it of UNets, of diffusion transformers
            and of `CLIPTextModel`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the component cannot be told, or is none that a pipeline loads LoRAs into; the base model is a
            model of another kind, or several at once; or the adapter holds what diffusers does not load.
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
    """Refuse components that belong to no one pipeline.

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
    """Write LoRAs, by component, into a directory, which is there, as `pytorch_lora_weights.safetensors`.

    The config of each is in the file's metadata (`lora_adapter_metadata`), from which diffusers makes it again.
    """
    mixin = _lora_base()
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, (config, state_dict) in loras.items():
        keys = {key.removeprefix(PEFT_PREFIX): value for key, value in state_dict.items()}
        if component.startswith(TEXT_ENCODER):
            keys = _of_text_encoder(keys)
        tensors |= mixin.pack_weights(keys, component)
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
    """The keys that diffusers has for text encoders: its own converter knows those of attention alone."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

    converted: dict[str, Tensor] = convert_state_dict_to_diffusers(state_dict)
    for side, direction in (("lora_A", "down"), ("lora_B", "up")):
        converted = {
            key.replace(f".{side}.weight", f".lora_linear_layer.{direction}.weight"): value
            for key, value in converted.items()
        }
    return converted


def _kind(source: AdapterSource) -> tuple[str | None, str | None]:
    """What kind of component the base model's class is, and which one, as far as the class tells."""
    if source.config.task_type is not None:
        raise ValueError(
            f"The adapter was trained for the task {source.config.task_type}, and a diffusion pipeline has no "
            "component for that. Export it in PEFT's format (format='peft')."
        )
    if source.base_class is None:
        return None, None
    name, module = source.base_class
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
        return TEXT_ENCODER, TEXT_ENCODER if name == "CLIPTextModel" else None
    return None, None


def _check_loadable(source: AdapterSource, component: str) -> None:
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
    """The components that each of diffusers' kinds of pipelines loads LoRAs into."""
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
