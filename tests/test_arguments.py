"""Public functions whose argument is of another kind, as where two were swapped, say so before they do anything."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

import wara_peft
from wara_peft import WaRAConfig, compression
from wara_peft.arguments import short_form
from wara_peft.compression.methods import METHODS

BUILT_BY_PEFT = {"WaRAConfig", "WaRAModel"}
RESULTS = {"CompressionReport", "DenseLayers", "Factorization", "LayerReport", "LayerStatistics"}
"""Classes that public functions return and users do not make."""
LAYERS = {name for name in compression.__all__ if re.search(r"Linear$|Conv(2d)?$|LowRankCache|LowRankTextHead", name)}
METHODS_OF_COMPRESS = {"Method", *(kind.__name__ for kind in METHODS.values())}
"""Classes whose fields `compress` checks."""
WITHOUT_ARGUMENTS = {"SaveAsLora"}
PUBLIC = [
    (module, name)
    for module in (wara_peft, compression)
    for name in module.__all__
    if name not in BUILT_BY_PEFT | RESULTS | LAYERS | METHODS_OF_COMPRESS | WITHOUT_ARGUMENTS
]


def model() -> nn.Module:
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), WaRAConfig(target_modules=["0"]))


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda value: value if isinstance(value, str) else "")
def test_the_first_argument(module, name):
    function = getattr(module, name)
    first, *others = inspect.signature(function).parameters.values()
    takes_a_model = first.name in ("model", "module", "weight", "cache")
    wrong = 0.5 if takes_a_model else model()
    needed = [model() for parameter in others if parameter.default is parameter.empty and parameter.kind < 2]
    # A context manager refuses its arguments when it is entered.
    with pytest.raises(TypeError) as raised, function(wrong, *needed):
        pass
    said = str(raised.value)
    assert "context manager" not in said
    if name in ("factorize_linear", "factorize_conv"):
        assert said.startswith("float is no")
        return
    assert said.startswith(f"{name}(") and f": {first.name} must be " in said
    assert said.endswith("0.5." if takes_a_model else "a PeftModel.")
    assert len(said) < 200


class Engine(nn.Module):
    """Wraps a model as DeepSpeed does, whose class is none of PyTorch's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


def data_parallel_of_one_process(inner: nn.Module) -> nn.Module:
    """A `DistributedDataParallel`, in a group of this process only."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(inner)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, data_parallel_of_one_process, Engine], ids=lambda wrap: wrap.__name__
)
@pytest.mark.parametrize(
    "call",
    [
        wara_peft.to_lora,
        lambda wrapped: wara_peft.save_as_lora("never-written", wrapped),
        lambda wrapped: wara_peft.lora_error(wrapped, 1),
        lambda wrapped: wara_peft.initialize_from_data(wrapped, [torch.ones(1, 4)]),
        lambda wrapped: wara_peft.allocate_ranks(wrapped, WaRAConfig(target_modules=["0"]), [torch.ones(1, 4)]),
    ],
)
def test_a_wrapped_model_names_the_model_inside(wrap, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(TypeError, match=r"is a \w+ around a PeftModel: pass the model inside, `model\.module`"):
            call(wrap(model()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: wara_peft.save_as_lora("out", 4), "model must be an nn.Module or a path, and is 4."),
        (
            lambda: wara_peft.save_as_lora("out", {"unet": 4}, format="diffusers"),
            "model must be an nn.Module or a path",
        ),
        (
            lambda: wara_peft.to_lora(model(), "other"),
            "a float in (0, 1]: the share of the energy to keep. The adapter's name is given as adapter_name='other'",
        ),
        (
            lambda: wara_peft.to_lora(model(), model()),
            "rank=a PeftModel must be an int of at least 1, or a float",
        ),
        (lambda: wara_peft.load_lora(model(), model()), "path must be a str or os.PathLike, and is a PeftModel."),
        (lambda: wara_peft.load_lora(model(), "lora", 8), "adapter_name must be a str, and is 8."),
        (lambda: wara_peft.allocate_ranks(model(), [], WaRAConfig()), "config must be a WaRAConfig, and is a list."),
        (lambda: wara_peft.initialize_from_data(model(), "default"), "dataloader must be an iterable of batches"),
        (lambda: wara_peft.rescale_adapter_scale(model(), model()).__enter__(), "multiplier must be a number"),
        (lambda: compression.compress(nn.Linear(4, 4), {}), "Dictionary, OneShotDictionary, and is a dict."),
        (
            lambda: compression.compress(nn.Linear(4, 4), "svd"),
            "compress(model, Activation(budget=0.6), statistics): method must be one of SVD, Fisher, Activation,",
        ),
        (lambda: compression.calibrate(nn.Linear(4, 4), {"x": torch.ones(1)}), "iterable of batches, and is a dict."),
        (lambda: compression.save_compressed(model(), model()), "path must be a str or os.PathLike"),
        (lambda: compression.save_statistics("out", [1]), "statistics must be a mapping, and is a list."),
        (lambda: compression.minimise_block_errors(model(), ["a"], [], []), "reference must be an nn.Module"),
    ],
)
def test_further_arguments(call, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=re.escape(said)):
        call()
    assert not list(tmp_path.iterdir())


def test_a_budget_that_is_a_solver():
    with pytest.raises(ValueError, match=r"budget='svd' must be a share such as 0\.6, a number of parameters, or a"):
        compression.compress(nn.Sequential(nn.Linear(4, 4)), compression.Activation("svd"))


def test_values_are_shown_where_they_are_short():
    assert (
        short_form("x") == "'x'"
        and short_form(None) == "None"
        and short_form(True) == "True"
        and short_form(0.5) == "0.5"
    )
    assert (
        short_form(nn.Linear(2, 2)) == "a Linear"
        and short_form({}) == "a dict"
        and short_form(torch.ones(2)) == "a Tensor"
    )
