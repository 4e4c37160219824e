"""Treats models that `torch.compile` has wrapped as the plain models inside.

`torch.compile(module)` returns a wrapper: a new module that holds the first one as its child `_orig_mod`. So
`_orig_mod` becomes a part of the names of all modules and parameters inside, whether a user compiles the whole model
or a few of its blocks. `module.compile()` makes no wrapper, and leaves names as they are.
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
"""Finds the wrapper's part of a name. In a regular expression for names the dot behind it is escaped."""


def plain_name(name: str) -> str:
    """Return a name, a key or a pattern for names as it is in the plain model, without parts for wrappers."""
    if "_orig_mod" not in name:
        return name
    return _IN_NAMES.sub("", name).rstrip(".")


def plain_names(names: Any) -> Any:
    """Apply `plain_name` to all names in a config's field: a string, the items of a list or set, a dict's keys."""
    if isinstance(names, str):
        return plain_name(names)
    if isinstance(names, (list, set)):
        return type(names)(map(plain_names, names))
    if isinstance(names, dict):
        return {plain_names(name): value for name, value in names.items()}
    return names


def compiled_module(module: nn.Module) -> nn.Module:
    """Return the module inside a wrapper; a module that is no wrapper is returned as it is."""
    while "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]  # type: ignore[assignment]  # it is there
    return module


def _wrapped_children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """List the wrappers inside of a model: for each its parent, its name in the parent, and the wrapper itself."""
    return [
        (parent, name, child)
        for parent in model.modules()
        if "_orig_mod" not in parent._modules
        for name, child in parent._modules.items()
        if child is not None and "_orig_mod" in child._modules
    ]


@contextmanager
def compiled_in_place(model: nn.Module) -> Iterator[nn.Module]:
    """Replace wrappers by the modules inside, each compiled in place, as `module.compile()` compiles it.

    This lasts beyond the block. If the block raises an error, the wrappers come back.

    Yields:
        The plain model, which is compiled as before.
    """
    plain, places = compiled_module(model), _wrapped_children(model)
    wrappers = [child for _, _, child in places] + ([] if plain is model else [model])
    before = [(compiled_module(wrapper), compiled_module(wrapper)._compiled_call_impl) for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            inner = compiled_module(wrapper)
            # `module.compile()` sets this private attribute. The wrapper's own `dynamo_ctx` keeps the options, such as
            # backend and mode, with which the user compiled.
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
    """Scope in which neither a model nor any part of it is compiled: names are plain, and hooks are called.

    Yields:
        The plain model: the model itself, or the module inside if it is a wrapper.
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
            # The block may have put another layer there, which the wrapper must not replace.
            if parent._modules.get(name) is compiled_module(wrapper):
                parent._modules[name] = wrapper


def on_plain_model(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function so that its argument `model` is the plain model while it runs.

    If the function returns the plain model, the caller gets the model that it passed in.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def on_plain(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        bound = signature.bind(*args, **kwargs)
        model = bound.arguments["model"]
        if not isinstance(model, nn.Module):
            # The function takes a path as well, or will say itself what is wrong with this argument.
            return function(*args, **kwargs)
        with plain_model(model) as plain:
            bound.arguments["model"] = plain
            result = function(*bound.args, **bound.kwargs)
        return model if result is plain else result  # type: ignore[return-value]

    return on_plain
