"""Reparametrises every LoRA that trains, in programs that know LoRA only: `wara-peft run --reparametrize-lora`.

The command says in an environment variable what it wants, so that child processes see it too. PEFT's functions that
make an adapter are then wrapped, and so are those that load one, which make it first and fill it later.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import peft
from peft import PeftMixedModel, PeftModel, PeftType
from torch import nn

from .coefficients_file import factors_of, remembered
from .reparametrize import reparametrize_lora

VARIABLE = "WARA_PEFT_REPARAMETRIZE_LORA"
"""The environment variable: arguments of `reparametrize_lora` as JSON."""

_made: ContextVar[list[str] | None] = ContextVar("_made", default=None)
"""Within a function that loads adapters: the names of those that are made for it, and whose values are yet to come."""


def obey_environment() -> None:
    """Wrap the functions that make and load adapters, if the environment says so."""
    if VARIABLE not in os.environ or hasattr(PeftModel.add_adapter, "_reparametrizes"):  # a reload has done it
        return
    from transformers.integrations.peft import PeftAdapterMixin  # in other processes it may be half imported by now

    settings = json.loads(os.environ[VARIABLE])
    makes, loads = functools.partial(_making, settings), functools.partial(_loading, settings)
    for model_class in (PeftModel, PeftMixedModel):
        model_class.__init__ = makes(model_class.__init__)  # type: ignore[method-assign]
        model_class.add_adapter = makes(model_class.add_adapter)  # type: ignore[method-assign]
        model_class.from_pretrained = classmethod(loads(model_class.from_pretrained.__func__))  # type: ignore
    PeftModel.load_adapter = loads(PeftModel.load_adapter)  # type: ignore[method-assign]  # PeftMixedModel calls it
    PeftAdapterMixin.load_adapter = loads(PeftAdapterMixin.load_adapter)  # type: ignore[method-assign]
    inject = makes(peft.inject_adapter_in_model)
    for module in (peft, peft.mapping):  # whose function others import from now on
        module.inject_adapter_in_model = inject  # type: ignore[attr-defined]


def _making(settings: dict[str, Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes an adapter, with arguments `adapter_name` and `peft_config`, and a model or `self`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def making(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        config, name = given.arguments["peft_config"], given.arguments["adapter_name"]
        # Who gives a state dict loads an adapter, as diffusers does for inference without saying so in the config.
        is_loaded = given.arguments.get("state_dict") is not None
        if config.peft_type == PeftType.LORA and not config.inference_mode and not is_loaded:
            made = _made.get()
            if made is None:
                _reparametrize(given.arguments.get("self", result), name, settings)
            else:
                made.append(name)
        return result

    making._reparametrizes = True  # type: ignore[attr-defined]
    return making


def _loading(settings: dict[str, Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that loads an adapter from a directory, into `self` or into a model that it returns."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def loading(*args: Any, **kwargs: Any) -> Any:
        if _made.get() is not None:  # one such function calls another
            return function(*args, **kwargs)
        made: list[str] = []
        before = _made.set(made)
        try:
            result = function(*args, **kwargs)
        finally:
            _made.reset(before)
        given = signature.bind(*args, **kwargs).arguments
        path = given.get("model_id", given.get("peft_model_id"))
        for name in made:
            # These values are looked at again, since only they tell whether the second file belongs to them.
            model = given.get("self", result)
            loaded: dict[str, Any] = {key: factor.weight for key, factor in factors_of(model, name, nn.Module)}
            _reparametrize(model, name, settings)
            with remembered(model, name, path, kwargs.get("subfolder")) as layers:
                for key, layer in layers:
                    layer.write(loaded[key])
        return result

    return loading


def _reparametrize(model: nn.Module, name: str, settings: dict[str, Any]) -> None:
    try:
        report = reparametrize_lora(model, name, **settings)
    except ValueError as error:
        raise ValueError(
            f"LoRA {name!r} cannot train in the wavelet domain, as wara-peft run --reparametrize-lora wants it to: "
            f"{error} Without that option it trains as plain LoRA."
        ) from error
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"wara-peft: LoRA {name!r}: {' '.join(str(report).splitlines())}", file=sys.stderr, flush=True)
