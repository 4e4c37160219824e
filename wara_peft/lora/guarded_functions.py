"""Functions of PEFT's and Accelerate's that handle all LoRA weights of a model, checked before they begin.

PEFT's functions write. Each write to a reparametrised LoRA takes effect or is refused, by `ComputedWeight`. But they
write one weight after the other, so a refusal in the middle would leave half of each behind. The checks come first.
Accelerate's functions offload parameters, which they look up in the model's state dict, where coefficients are not.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from accelerate import big_modeling
from peft.tuners.lora import LoraLayer, eva
from peft.utils import hotswap, loftq_utils
from torch import Tensor, nn

from .coefficients_file import ModelMethod
from .reparametrized_layers import ReparametrizedLayer


def guard_functions() -> None:
    """Let these functions check reparametrised LoRA first, wherever they have been imported already.

    A second call does nothing.
    """
    for function, check in _CHECKS.items():
        if getattr(sys.modules[function.__module__], function.__name__) is function:
            guarded = _guarded(function, check)
            for module in list(sys.modules.values()):
                names = vars(module) if isinstance(module, type(sys)) else {}
                if names.get(function.__name__) is function:
                    setattr(module, function.__name__, guarded)


def keep_adapter_in_refused_hotswaps(model: nn.Module) -> None:
    """Let `load_lora_adapter` of a model of diffusers leave the adapter in place if it cannot be swapped.

    diffusers deletes an adapter of that name after any error.
    """
    if hasattr(type(model), _Swapping.name):
        vars(model).setdefault(_Swapping.name, _Swapping(model))


class _Swapping(ModelMethod):
    name = "load_lora_adapter"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.__signature__.bind(*args, **kwargs).arguments.get("hotswap", False):
            return self.method(*args, **kwargs)
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        configs = dict(self.model.peft_config)
        for layer in layers:
            layer.delete_adapter = _delete_nothing  # type: ignore[method-assign]
        try:
            return self.method(*args, **kwargs)
        except Exception:
            self.model.peft_config.update(configs)
            raise
        finally:
            for layer in layers:
                del layer.delete_adapter


def _delete_nothing(adapter_name: str) -> None:
    pass


def _guarded(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        check(function.__name__, *args, **kwargs)
        return function(*args, **kwargs)

    return checking


def _check_hotswap(_: str, model: nn.Module, state_dict: Mapping[str, Tensor], *others: Any, **more: Any) -> None:
    """Find coefficients for all new weights. A smaller one is written into the first rows, and zeros into the rest."""
    for key, new in state_dict.items():
        place, _, name = key.rpartition(".")
        try:
            layer = attrgetter(place)(model)
        except AttributeError:
            return  # PEFT refuses keys that the model lacks
        if name == "weight" and isinstance(layer, ReparametrizedLayer):
            layer.prepared(_as_written(new, layer.weight))


def _as_written(new: Tensor, old: Tensor) -> Tensor:
    if new.ndim != old.ndim or any(more > size for more, size in zip(new.shape, old.shape, strict=True)):
        return new  # which is then refused for its shape
    written = torch.zeros(old.shape, dtype=old.dtype, device=old.device)
    written[tuple(map(slice, new.shape))] = new.to(written)
    return written


def _check_padding(_: str, model: nn.Module, *, target_rank: int | None = None, **more: Any) -> None:
    for name, layer in _reparametrized(model):
        rank = layer.factor.rank
        if target_rank not in (None, rank):
            raise ValueError(
                f"prepare_model_for_compiled_hotswap cannot give {name!r} the rank target_rank={target_rank}, for its "
                f"LoRA is reparametrised with r={rank}. Make the LoRA with r={target_rank}, or call "
                "`wara_peft.plain_lora(model)` first."
            )


def _refuse(function: str, model: nn.Module, *others: Any, **more: Any) -> None:
    for name, _ in _reparametrized(model):
        raise ValueError(
            f"{function} gives LoRA values that lie in no bands, and {name!r} has a reparametrised LoRA. Call "
            "`wara_peft.plain_lora(model)` first; `reparametrize_lora(model, project=True)` then takes the nearest."
        )


def _refuse_offloading(
    function: str, model: nn.Module, device_map: Mapping[str, Any] | None = None, *others: Any, **more: Any
) -> None:
    """Refuse what takes parameters from the model's state dict, which has weights and no coefficients."""
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else set()
    if function == "dispatch_model" and "disk" not in devices and (len(devices) == 1 or "cpu" not in devices):
        return
    for name, _ in _reparametrized(model):
        raise ValueError(
            f"{function} offloads the weights of a state dict, and {name!r} has a reparametrised LoRA, whose "
            "parameters are coefficients. Call `wara_peft.plain_lora(model)` first."
        )


def _reparametrized(model: nn.Module) -> list[tuple[str, ReparametrizedLayer]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, ReparametrizedLayer)]


_CHECKS: dict[Callable[..., Any], Callable[..., None]] = {
    hotswap.hotswap_adapter_from_state_dict: _check_hotswap,
    hotswap.prepare_model_for_compiled_hotswap: _check_padding,
    eva.initialize_lora_eva_weights: _refuse,
    loftq_utils.replace_lora_weights_loftq: _refuse,
    big_modeling.cpu_offload: _refuse_offloading,
    big_modeling.disk_offload: _refuse_offloading,
    big_modeling.dispatch_model: _refuse_offloading,
}
