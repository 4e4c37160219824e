"""Rows about the experts of a mixture, which transformers keeps as bare parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from tests.models import EXPERTS, MIXTURES, WORDS
from tests.models import mixture as any_mixture

from .models import adapted, close, output, train
from .table import INSIDE, LORA, WARA, Area, Method

AREA = Area("Experts of a mixture")
row = AREA.row


def mixture(name: str = "Mixtral") -> nn.Module:
    model = any_mixture(name)
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def of_experts(method: Method, init: bool = True, **fields: object) -> PeftModel:
    return adapted(method, mixture(), init=init, target_modules=[], target_parameters=EXPERTS, **fields)


def trained_parameters(method: Method, name: str, **fields: object) -> tuple[set[str], int]:
    """What a config adapts, by name, and how many parameters train, with LoRA's r=4 and as many of WaRA's."""
    rank = {WARA.name: 2, INSIDE.name: 8}.get(method.name, 4)
    model = get_peft_model(mixture(name), method.config(r=rank, **fields))
    method.finish(model, "default")
    tuner = model.base_model
    named = {*tuner.targeted_module_names, *tuner.targeted_parameter_names}
    return named, model.get_nb_trainable_parameters()[0]


def trains_and_merges(method: Method, name: str) -> None:
    before = output(mixture(name), WORDS)
    model = adapted(method, mixture(name), init=True, target_modules=[], target_parameters=EXPERTS)
    assert close(output(model, WORDS), before)
    train(model, WORDS)
    after = output(model, WORDS)
    assert not close(after, before, 1e-3)
    assert close(output(model.merge_and_unload(), WORDS), after, 1e-3)


for name in MIXTURES:

    @row(f"`target_parameters`, the experts of {name}: training and merging")
    def target_parameters(method: Method, name: str = name) -> str | None:
        trains_and_merges(method, name)

    @row(f'`target_modules="all-linear"` on {name}, router included: the same targets and number of parameters')
    def all_linear(method: Method, name: str = name) -> str | None:
        assert trained_parameters(method, name, target_modules="all-linear") == trained_parameters(
            LORA, name, target_modules="all-linear"
        )


@row("names of the experts' layers in older checkpoints, such as Mixtral's `w1` and `w3`")
def names_of_layers(method: Method) -> str | None:
    fields = {"target_modules": ["w1", "w2", "w3"]}
    assert trained_parameters(method, "Mixtral", **fields) == trained_parameters(LORA, "Mixtral", **fields)


@row("dropout on the way to experts' updates", lora="refused: does not work with lora_dropout != 0")
def dropout(method: Method) -> str | None:
    train(of_experts(method, dropout=0.1), WORDS, steps=8)


@row("`save_pretrained` and `from_pretrained` of experts' adapters, and an exact LoRA of them")
def saving(method: Method, directory: Path) -> str | None:
    model = of_experts(method, init=False)
    model.save_pretrained(directory / "adapter")
    expected = output(model, WORDS)
    assert close(output(PeftModel.from_pretrained(mixture(), directory / "adapter"), WORDS), expected)
    exported = method.as_lora(directory / "adapter")
    assert close(output(PeftModel.from_pretrained(mixture(), exported), WORDS), expected, 1e-4)


def in_four_bits() -> nn.Module:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = mixture()
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name)
    return model


QUANTIZED = [f"model.layers.0.mlp.{name}" for name in EXPERTS]


@row(
    "experts quantized to 4 bits by bitsandbytes: training",
    lora="refused: only Tensors of floating point dtype can require gradients",
    needs="bitsandbytes",
    dtype=torch.float32,
)
def quantized(method: Method) -> str | None:
    train(adapted(method, in_four_bits(), init=True, target_modules=[], target_parameters=QUANTIZED), WORDS)


@row(
    "a batch that mixes adapters, with experts adapted",
    lora="refused: does not support mixed adapter batches",
    wara="refused: Cannot pass `adapter_names` to a model with adapted parameters",
    instead="a batch for each adapter",
)
def mixed_batch(method: Method) -> str | None:
    of_experts(method)(**WORDS, adapter_names=["default", "__base__"])


@row(
    "`add_weighted_adapter` of adapters of experts",
    lora="refused: add_weighted_adapter does not support targeting nn.Parameter",
    wara="refused: Adapters of bare parameters",
    instead="`set_adapter` with several names, or merging one after the other",
)
def weighted(method: Method) -> str | None:
    of_experts(method).base_model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "both", "linear")
