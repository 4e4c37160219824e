"""A second file beside a LoRA's checkpoint, with the coefficients that a reparametrised LoRA is computed from.

A checkpoint of a reparametrised LoRA has LoRA's weights, from which the coefficients are found again to rounding. With
this file they are found to the bit, so that a training resumes as if it had not been interrupted. Other programs
ignore it. Keys are `<module>.lora_A.level1` and so on, without the name of the adapter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..disk.adapters.contents import PEFT_PREFIX
from ..disk.checkpoints.directory import written_at_once
from .reparametrized_layers import FACTOR, ReparametrizedLayer

FILE = "lora_coefficients.safetensors"


def keep_coefficients_in_checkpoints(model: nn.Module) -> None:
    """Let `save_pretrained` and `load_adapter` of this model write and read the second file."""
    for name, wrapper in (("save_pretrained", _Saving), ("load_adapter", _Loading)):
        if hasattr(type(model), name) and name not in vars(model):
            setattr(model, name, wrapper(model))


def keep_only_weights_in_checkpoints(model: nn.Module) -> None:
    """Undo `keep_coefficients_in_checkpoints`, and take away the other methods of this kind."""
    for name in ("save_pretrained", "load_adapter", "add_adapter"):
        if isinstance(vars(model).get(name), ModelMethod):
            delattr(model, name)


class ModelMethod:
    """A method of one model. An object, unlike a function, is copied and pickled with the model that it belongs to."""

    def __init__(self, model: Any) -> None:
        self.model = model


class _Saving(ModelMethod):
    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = _with_weights(model, kwargs["state_dict"])
        result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            for adapter in kwargs.get("selected_adapters") or _adapters(model):
                tensors = {
                    f"{key}.{level}": rows.detach().contiguous()
                    for key, layer in _layers(model, adapter)
                    for level, rows in layer.factor.named_parameters()
                }
                # Sharded coefficients would have to be gathered by all processes, and this may run in one of them.
                if tensors and not any(isinstance(rows, DTensor) or not rows.numel() for rows in tensors.values()):
                    with written_at_once(_directory(model, save_directory, adapter), existing="update") as directory:
                        save_file(tensors, Path(directory) / FILE)
        return result


class _Loading(ModelMethod):
    def __call__(self, path: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        file = Path(path, kwargs.get("subfolder") or "", FILE) if isinstance(path, (str, os.PathLike)) else None
        layers: list[tuple[str, ReparametrizedLayer]] = []
        if file is not None and file.is_file():
            tensors = load_file(file)
            layers = list(_layers(model, adapter_name or "default"))
            for key, layer in layers:
                names = [level for level, _ in layer.factor.named_parameters()]
                if all(f"{key}.{level}" in tensors for level in names):
                    layer.remembered = {level: tensors[f"{key}.{level}"] for level in names}
        try:
            return type(model).load_adapter(model, path, adapter_name, *args, **kwargs)
        finally:
            for _, layer in layers:
                layer.remembered = None


def _directory(model: nn.Module, save_directory: str | os.PathLike[str], adapter: str) -> Path:
    """Where PEFT saves an adapter; transformers' own models save one adapter, in the directory itself."""
    subfolder = adapter if hasattr(model, "base_model") and hasattr(model, "get_base_model") else "default"
    return Path(save_directory) if subfolder == "default" else Path(save_directory, subfolder)


def _layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, ReparametrizedLayer]]:
    """The reparametrised layers of an adapter, by the beginning of their keys."""
    for name, module in model.named_modules():
        place, _, last = name.rpartition(".")
        if isinstance(module, ReparametrizedLayer) and last == adapter:
            yield place.removeprefix(PEFT_PREFIX), module


def _adapters(model: nn.Module) -> list[str]:
    names = (
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, ReparametrizedLayer)
    )
    return list(dict.fromkeys(names))


def _with_weights(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with LoRA's weights in the place of coefficients.

    DeepSpeed, which gathers parameters by their names, makes one with coefficients.
    """
    result = dict(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, ReparametrizedLayer):
            keys = {level: f"{name}.{FACTOR}.{level}" for level, _ in module.factor.named_parameters()}
            if all(key in result for key in keys.values()):
                result[f"{name}.weight"] = module.made_of({level: result.pop(key) for level, key in keys.items()})
    return result
