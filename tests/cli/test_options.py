"""Names and defaults that the command line writes out, so as not to import the library, are the library's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from inspect import signature
from typing import Any, get_args, get_type_hints

import pytest
import torch

from wara_peft.compression.budget.costs import COSTS
from wara_peft.compression.budget.spend import ALLOCATIONS
from wara_peft.compression.disk.from_texts import compress_checkpoint
from wara_peft.compression.methods import METHODS, Method
from wara_peft.compression.solvers.table import SOLVERS
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.disk.checkpoints.dequantized import QUANTIZATIONS
from wara_peft.disk.checkpoints.tensors import FLOATS
from wara_peft.injection.combine import COMBINATION_TYPES
from wara_peft.lora import export as lora_export
from wara_peft.lora.combine_saved import combine_adapters
from wara_peft.lora.engines import ENGINES
from wara_peft.lora.engines import FileFormat as FileFormatOfPackage
from wara_peft_cli.combine import combine
from wara_peft_cli.compress import compress
from wara_peft_cli.export import export
from wara_peft_cli.merge import merge
from wara_peft_cli.options import (
    BY_EXPERT,
    DTYPES,
    FORMATS,
    CombinationType,
    Cost,
    Engine,
    FileFormat,
    Quantization,
    torch_dtype,
)


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        (get_type_hints(Method)["allocation"], ALLOCATIONS),
        (Cost, COSTS),
        (Quantization, QUANTIZATIONS),
        (FileFormat, get_args(FileFormatOfPackage)),
        (Engine, ENGINES),
        (CombinationType, COMBINATION_TYPES),
    ],
)
def test_choices(choices: Any, names: Collection[str]) -> None:
    assert sorted(get_args(choices)) == sorted(names)


def test_engines() -> None:
    assert {name: FORMATS.get(name, "peft") for name in ENGINES} == {n: engine.format for n, engine in ENGINES.items()}
    assert {*BY_EXPERT} == {name for name, engine in ENGINES.items() if engine.experts == "apart"}


def test_methods() -> None:
    """Every method that the command line knows can be computed, and each of its fields but the budget is an option."""
    assert {*METHODS.values()} <= SOLVERS.keys()
    options = signature(compress).parameters
    names = {field.name for method in METHODS.values() for field in fields(method)}
    assert names <= options.keys() and options["budget"].default is options["budget"].empty
    assert all(options[name].default is None for name in names - {"budget"})  # left to the method's own default


def test_dtypes() -> None:
    written = {torch_dtype(name) for name in DTYPES.values()}
    assert written == set(FLOATS.values()) - {torch.float64}  # nobody needs a LoRA or a model in that
    for name in written:
        assert str(name).removeprefix("torch.") in DTYPES
    assert torch_dtype(None) is None


@pytest.mark.parametrize(
    ("command", "function", "renamed"),
    [
        (export, lora_export.convert, {}),
        (merge, merge_checkpoint, {}),
        (combine, combine_adapters, {}),
        (compress, compress_checkpoint, {"memory": "max_bytes"}),
    ],
)
def test_defaults(command: Callable[..., None], function: Callable[..., Any], renamed: dict[str, str]) -> None:
    """An option that is left out does what the function does without it."""
    ours = {renamed.get(name, name): option.default for name, option in signature(command).parameters.items()}
    theirs = {name: argument.default for name, argument in signature(function).parameters.items()}
    both = ours.keys() & theirs.keys()
    assert len(both) > 3 and set(renamed.values()) <= both
    assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}
