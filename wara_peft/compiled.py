"""Models that `torch.compile` has wrapped, treated as the plain models that they are.

`torch.compile(module)` gives another module, which holds the first as its `_orig_mod`: a part of the name of all that
is inside, whether the whole model or a few of its blocks are compiled. `module.compile()` leaves names as they are.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from torch import nn

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_IN_NAMES = re.compile(r"(?<!\w)_orig_mod(?:\\?\.|$)")
"""The wrapper's part of a name, or of a pattern for names, which escapes the dot."""


def plain_name(name: str) -> str:
    """A name of a module, parameter or key, or a pattern for names, as it is in the plain model."""
    if "_orig_mod" not in name:
        return name
    return _IN_NAMES.sub("", name).rstrip(".")


def plain_names(names: Any) -> Any:
    """Names in a field of a config: one of them, those in a list or set, or the keys of a dict."""
    if isinstance(names, str):
        return plain_name(names)
    if isinstance(names, (list, set)):
        return type(names)(map(plain_names, names))
    if isinstance(names, dict):
        return {plain_names(name): value for name, value in names.items()}
    return names


def compiled_module(module: nn.Module) -> nn.Module:
    """The module that a wrapper compiles, or the module itself where it is none."""
    while "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]  # type: ignore[assignment]  # it is there
    return module


def _wrapped_children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Modules that are compiled inside of a model: the module that has one, its name there, and the wrapper."""
    return [
        (parent, name, child)
        for parent in model.modules()
        if "_orig_mod" not in parent._modules
        for name, child in parent._modules.items()
        if child is not None and "_orig_mod" in child._modules
    ]


@contextmanager
def compiled_in_place(model: nn.Module) -> Iterator[nn.Module]:
    """Compile in place what is wrapped, as `module.compile()` would have done, for good if the block does not raise.

    Yields:
        The plain model, which is compiled as before.
    """
    plain, places = compiled_module(model), _wrapped_children(model)
    wrappers = [child for _, _, child in places] + ([] if plain is model else [model])
    before = [(compiled_module(wrapper), compiled_module(wrapper)._compiled_call_impl) for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            inner = compiled_module(wrapper)
            inner._compiled_call_impl = wrapper.dynamo_ctx(inner._call_impl)  # type: ignore[operator]
        for parent, name, wrapper in places:
            parent._modules[name] = compiled_module(wrapper)
        yield plain
    except BaseException:
        for parent, name, wrapper in places:
            parent._modules[name] = wrapper
        for inner, call in before:
            inner._compiled_call_impl = call
        raise


@contextmanager
def plain_model(model: nn.Module) -> Iterator[nn.Module]:
    """Scope in which a model is not compiled, nor any part of it: names are plain, and hooks are called.

    Yields:
        The model itself, or what it wraps.
    """
    plain, places = compiled_module(model), _wrapped_children(model)
    for parent, name, wrapper in places:
        parent._modules[name] = compiled_module(wrapper)
    in_place = [(module, module._compiled_call_impl) for module in plain.modules()]
    in_place = [(module, call) for module, call in in_place if call is not None]
    try:
        for module, _ in in_place:
            module._compiled_call_impl = None
        yield plain
    finally:
        for module, call in in_place:
            module._compiled_call_impl = call
        for parent, name, wrapper in places:
            if parent._modules.get(name) is compiled_module(wrapper):  # or another layer has taken its place
                parent._modules[name] = wrapper


def on_plain_model(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Give a function its argument `model` as `plain_model`; where it returns that, return the model passed in."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def on_plain(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        bound = signature.bind(*args, **kwargs)
        model = bound.arguments["model"]
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)
        with plain_model(model) as plain:
            bound.arguments["model"] = plain
            result = function(*bound.args, **bound.kwargs)
        return model if result is plain else result  # type: ignore[return-value]

    return on_plain
