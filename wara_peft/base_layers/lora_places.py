"""Translates names of adapted modules and keys of tensors to those of PEFT's LoRA on the same modules.

The two differ where LoRA puts more wrappers around a module. It wraps an `nn.MultiheadAttention` as a whole, and its
output projection once more. It wraps a module of bare parameters once for each parameter that is adapted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .kinds import CONV1D, IN_PROJ, ModuleShape

Shapes = Mapping[str, ModuleShape]
"""The adapted modules and parameters, by name."""


def loras_targets(shapes: Shapes) -> tuple[list[str], list[str]]:
    """Return LoRA's `target_modules` and `target_parameters`; an attention as a whole stands for its weights."""
    attentions = sorted(name.rpartition(".")[0] for name, shape in shapes.items() if shape.kind is IN_PROJ)
    parameters = [name for name, shape in shapes.items() if shape.kind.is_parameter and shape.kind is not IN_PROJ]
    outputs = {f"{attention}.out_proj" for attention in attentions}
    modules = [name for name, shape in shapes.items() if not shape.kind.is_parameter and name not in outputs]
    return [*modules, *attentions], parameters


def fan_in_fan_out(shapes: Iterable[ModuleShape]) -> bool:
    """Return the value of LoRA's field `fan_in_fan_out`: whether all layers are transformers' `Conv1D`."""
    return all(shape.kind is CONV1D for shape in shapes)


def has_attention(shapes: Iterable[ModuleShape]) -> bool:
    """Whether an `nn.MultiheadAttention` is adapted."""
    return any(shape.kind is IN_PROJ for shape in shapes)


def lora_name(shapes: Shapes, name: str) -> str:
    """Return the name of the module in which PEFT's LoRA keeps the tensors for what is adapted as `name`.

    For a bare parameter that is a wrapper around its module. If several of a module are adapted, each wrapper lies
    around that of the parameter before: the last one is outermost.
    """
    module, shape = name.rpartition(".")[0], shapes[name]
    if shape.kind is IN_PROJ:
        return module
    if name == f"{module}.out_proj" and _is_attention(shapes, module):
        return f"{module}.base_layer.out_proj"
    if not shape.kind.is_parameter:
        return name
    return module + ".base_layer" * sum(other.position > shape.position for other in _parameters_of(shapes, module))


def lora_key(shapes: Shapes, key: str) -> str:
    """Return the key under which PEFT's LoRA keeps a tensor that an adapter holds in full, such as a bias.

    LoRA is for the dense model: where WaRA adapts a factorised layer, LoRA has a dense one with its bias beside the
    weight.
    """
    module, around, name = key.partition(".base_layer.")
    if not around:
        return key
    if name == "out_proj.bias" and _is_attention(shapes, module):
        return f"{module}.base_layer.out_proj.base_layer.bias"
    if module in shapes and shapes[module].kind.is_factorized:
        return f"{module}.base_layer.{name.rpartition('.')[2]}"
    return f"{module}{'.base_layer' * max(1, len(_parameters_of(shapes, module)))}.{name}"


def _is_attention(shapes: Shapes, module: str) -> bool:
    in_proj = shapes.get(f"{module}.in_proj_weight")
    return in_proj is not None and in_proj.kind is IN_PROJ


def _parameters_of(shapes: Shapes, module: str) -> list[ModuleShape]:
    """The adapted bare parameters of a module."""
    return [shape for name, shape in shapes.items() if shape.kind.is_parameter and name.rpartition(".")[0] == module]
