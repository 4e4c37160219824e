"""A second file beside a LoRA's checkpoint, with the coefficients that a reparametrised LoRA is computed from.

A checkpoint of a reparametrised LoRA has LoRA's weights, from which the coefficients are found again to rounding. With
this file they are found to the bit, so that a training resumes as if it had not been interrupted. Other programs
ignore it. Keys are `<module>.lora_A.level1` and so on, without the name of the adapter.
"""

from __future__ import annotations

import inspect
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..compiled import plain_name
from ..disk.adapters.contents import PEFT_PREFIX
from .reparametrized_layers import FACTOR, ReparametrizedLayer
from .sharded_coefficients import is_whole

FILE = "lora_coefficients.safetensors"
_Layer = TypeVar("_Layer", bound=nn.Module)


def keep_coefficients_in_checkpoints(model: nn.Module) -> None:
    """Let `save_pretrained` and `load_adapter` of this model write and read the second file."""
    if hasattr(type(model), "load_adapter"):  # what others save, nothing would read
        for kind in (_Saving, _Loading):
            if kind.name not in vars(model):
                setattr(model, kind.name, kind(model))


def keep_only_weights_in_checkpoints(model: nn.Module) -> None:
    """Undo `keep_coefficients_in_checkpoints`, and take away the other methods of this kind."""
    for name, method in list(vars(model).items()):
        if isinstance(method, ModelMethod):
            delattr(model, name)


def factors_of(model: nn.Module, adapter: str, kind: type[_Layer]) -> Iterator[tuple[str, _Layer]]:
    """The factors of an adapter that are of this kind, by the beginning of their keys in the second file."""
    for name, module in model.named_modules():
        place, _, last = name.rpartition(".")
        if isinstance(module, kind) and last == adapter and place.endswith(("lora_A", "lora_B")):
            yield plain_name(place).removeprefix(PEFT_PREFIX), module


@contextmanager
def remembered(
    model: nn.Module, adapter: str, path: Any, subfolder: str | None = None
) -> Iterator[list[tuple[str, ReparametrizedLayer]]]:
    """Scope in which weights are looked up in the second file of a saved LoRA before coefficients are computed.

    Args:
        model, adapter: the adapter into which the saved one is loaded.
        path, subfolder: where it is saved. A name on the Hub has no second file.

    Yields:
        The factors that the file has coefficients of.
    """
    tensors = _read(Path(path, subfolder or "", FILE)) if isinstance(path, (str, os.PathLike)) else {}
    found: list[tuple[str, ReparametrizedLayer]] = []
    for key, layer in factors_of(model, adapter, ReparametrizedLayer):
        expected = dict(layer.factor.named_parameters())
        saved = {level: tensors.get(f"{key}.{level}") for level in expected}
        if all(rows is not None and _alike(rows, expected[level]) for level, rows in saved.items()):
            # Another device might round in another way, and so not recognise the weight.
            layer.remembered = {level: _beside(rows, expected[level]) for level, rows in saved.items()}  # type: ignore
            found.append((key, layer))
    try:
        yield found
    finally:
        for _, layer in found:
            layer.remembered = None


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(
            f"{str(file)!r} cannot be read ({error}), so the coefficients are computed from the LoRA beside it, "
            "which gives them to rounding, not to the bit."
        )
        return {}


def _alike(saved: Tensor, present: Tensor) -> bool:
    return saved.shape == present.shape and saved.is_floating_point()


def _beside(saved: Tensor, present: Tensor) -> Tensor:
    return saved if present.is_meta else saved.to(present.device)


class ModelMethod:
    """A method of one model. An object, unlike a function, is copied and pickled with the model that it belongs to."""

    name: str

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def method(self) -> Any:
        """The method of this name that the model's class has."""
        return getattr(type(self.model), self.name).__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.method)


class _Saving(ModelMethod):
    name = "save_pretrained"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        given = bound.arguments | bound.arguments.get("kwargs", {})
        state_dict = given.get("state_dict") or {}
        if state_dict:
            holder = bound.arguments if "state_dict" in bound.arguments else bound.arguments["kwargs"]
            holder["state_dict"] = _with_weights(self.model, state_dict)
        result = self.method(*bound.args, **bound.kwargs)
        if given.get("is_main_process", True):
            for adapter, directory in _directories(self.model, given).items():
                tensors = _coefficients(self.model, adapter, state_dict)
                # Sharded coefficients would have to be gathered by all processes, and this may run in one of them.
                if tensors and all(map(is_whole, tensors.values())):
                    # Every process of a training may save to one place, as PEFT allows.
                    temporary = directory / f".{FILE}.{uuid.uuid4().hex[:8]}.partial"
                    save_file(tensors, temporary, metadata={"format": "pt"})
                    temporary.replace(directory / FILE)
        return result


class _Loading(ModelMethod):
    name = "load_adapter"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.__signature__.bind(*args, **kwargs).arguments
        path = given.get("model_id", given.get("peft_model_id"))
        adapter = given.get("adapter_name") or "default"
        second_file = remembered(self.model, adapter, path, kwargs.get("subfolder"))
        with restored_after_errors(self.model, adapter), second_file:
            return self.method(*args, **kwargs)


@contextmanager
def restored_after_errors(model: nn.Module, adapter: str) -> Iterator[None]:
    """Scope that gives an adapter back the values that it had, if it raises.

    transformers' hotswap assigns one weight after the other, and one that lies outside of the span is refused.
    """
    before = [
        (module, name, parameter, parameter.detach().clone())
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if adapter in f"{path}.{name}".split(".")
    ]
    try:
        yield
    except BaseException:
        for module, name, parameter, values in before:
            module._parameters[name] = parameter
            parameter.detach().copy_(values)
        raise


def _directories(model: Any, given: Mapping[str, Any]) -> dict[str, Path]:
    """The adapters that have been saved, and where: models of transformers save the active one."""
    place = Path(given["save_directory"])
    if not isinstance(model, PeftModel):
        return dict.fromkeys(model.active_adapters(), place)
    adapters = given.get("selected_adapters") or list(model.peft_config)
    return {adapter: place if adapter == "default" else place / adapter for adapter in adapters}


def _coefficients(model: nn.Module, adapter: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the second file, from the state dict if that has them."""
    names = {module: name for name, module in model.named_modules()}
    return {
        f"{key}.{level}": state_dict.get(f"{names[layer]}.{FACTOR}.{level}", rows).detach().contiguous()
        for key, layer in factors_of(model, adapter, ReparametrizedLayer)
        for level, rows in layer.factor.named_parameters()
    }


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
