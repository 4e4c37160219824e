"""Adapters that are added to a model with the very config of a reparametrised one, which are then reparametrised too.

TRL makes its references so: `model.add_adapter("ref", model.peft_config["default"])`. DPO, KTO and GRPO then
copy each parameter whose name has `default` to the one whose name has `ref` in its place.

PEFT's `reduce_intruder_dimension` adds an adapter in the same way, and writes any values to its weights. So a copy
that does not train gives way: its factors become plain where such values are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from peft import PeftConfig
from torch import nn

from .coefficients_file import ModelMethod
from .reparametrized_layers import ReparametrizedLayer


def reparametrize_copies(
    model: nn.Module, adapter_name: str, settings: dict[str, Any], reparametrize: Callable[..., Any]
) -> None:
    """Let `add_adapter` of a `PeftModel` do this for copies of an adapter.

    Args:
        model: the model. Others than `PeftModel` are left as they are.
        adapter_name: the adapter that is reparametrised.
        settings: those that it was reparametrised with.
        reparametrize: `reparametrize_lora`.
    """
    if hasattr(model, "add_adapter") and hasattr(model, "get_base_model"):
        if "add_adapter" not in vars(model):
            model.add_adapter = _Adding(model, reparametrize)  # type: ignore[assignment]
        if isinstance(model.add_adapter, _Adding):
            model.add_adapter.settings[adapter_name] = settings


class _Adding(ModelMethod):
    name = "add_adapter"

    def __init__(self, model: Any, reparametrize: Callable[..., Any]) -> None:
        super().__init__(model)
        self.reparametrize = reparametrize
        self.settings: dict[str, dict[str, Any]] = {}

    def __call__(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
        known = self.model.peft_config
        same = [name for name in self.settings if name in known and known[name] is peft_config]
        result = self.method(adapter_name, peft_config, *args, **kwargs)
        if same and not list(_layers(self.model, adapter_name)):
            self.reparametrize(self.model, adapter_name, project=True, **self.settings[same[0]])
            for layer in _layers(self.model, adapter_name):
                layer.gives_way = True
        return result


def _layers(model: nn.Module, adapter_name: str) -> Iterator[ReparametrizedLayer]:
    for name, module in model.named_modules():
        if isinstance(module, ReparametrizedLayer) and name.endswith(f".{adapter_name}"):
            yield module
