"""Rows about generation, export, and the helpers of PEFT."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.helpers import (
    disable_input_dtype_casting,
    find_kappa_target_modules,
    rescale_adapter_scale,
    update_signature,
)
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import cast_mixed_precision_params

import wara_peft
from tests.models import TOKENS, WORDS, llama, mlp

from . import same_factors
from .models import X, adapted, close, layers_of, output, train
from .table import WARA, WORKS, Area, Method

AREA = Area("Serving and helpers")
row = AREA.row


def generated(model: torch.nn.Module, **options: Any) -> list[list[int]]:
    return model.generate(TOKENS, max_new_tokens=5, do_sample=False, **options).tolist()


@row("`generate`, greedy and with beams")
def generate(method: Method) -> str | None:
    model = adapted(method, llama(), alpha=200)
    output(model, WORDS)
    found = [generated(model), generated(model, num_beams=2)]
    merged = model.merge_and_unload()
    assert found == [generated(merged), generated(merged, num_beams=2)]


@row("`generate` with `adapter_names`")
def generate_mixed(method: Method) -> str | None:
    model = adapted(method, llama(), alpha=200)
    output(model, WORDS, adapter_names=["default", "__base__"])
    expected = [generated(model)[0], generated(llama())[1]]
    assert generated(model, adapter_names=["default", "__base__"]) == expected


@row("`torch.export`")
def export(method: Method) -> str | None:
    model = adapted(method)
    program = torch.export.export(model, (X,))
    assert close(program.module()(X), output(model))


@row("`inject_adapter_in_model`")
def inject(method: Method) -> str | None:
    torch.manual_seed(1)
    model = inject_adapter_in_model(method.config(False, target_modules=["up"]), mlp())
    method.finish(model, "default")
    assert type(model) is type(mlp()) and not close(output(model), output(mlp()))
    train(model)


@row("copies and pickles of a model")
def copies(method: Method) -> str | None:
    model = adapted(method)
    assert torch.equal(output(copy.deepcopy(model)), output(model))
    assert torch.equal(output(pickle.loads(pickle.dumps(model))), output(model))


@row("`get_layer_status`, `get_model_status`")
def status(method: Method) -> str | None:
    model = adapted(method)
    layers, whole = model.get_layer_status(), model.get_model_status()
    assert {layer.name for layer in layers} == {"model.up", "model.down"}
    assert all(layer.active_adapters == ["default"] and layer.requires_grad == {"default": True} for layer in layers)
    assert whole.trainable_params == model.get_nb_trainable_parameters()[0]
    assert whole.peft_types == {"default": method.prefix.upper()} and whole.enabled and not whole.merged_adapters


@row("`layer.get_delta_weight`, `layer.scaling`, `layer.r`")
def reading(method: Method) -> str | None:
    layer = adapted(method, alpha=3).base_model.model.up
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape
    same_factors.meet(layer.get_delta_weight("default"))
    assert layer.scaling["default"] == 3 / layer.r["default"]


@row("`set_scale`, `scale_layer`, `unscale_layer`")
def scales(method: Method) -> str | None:
    layer = adapted(method).base_model.model.up
    before = layer.get_delta_weight("default")
    layer.set_scale("default", 3.0)
    layer.scale_layer(2.0)
    assert close(layer.get_delta_weight("default"), 6 * before)
    same_factors.meet(6 * before)
    layer.unscale_layer()
    assert close(layer.get_delta_weight("default"), before)


def rescaled(method: Method, helper: Any) -> str | None:
    model = adapted(method)
    expected = output(model)
    with helper(model, 0.0):
        assert close(output(model), output(mlp()))
    assert torch.equal(output(model), expected)


row(
    "`peft.helpers.rescale_adapter_scale`",
    wara="refused: scaling is only supported for models with `LoraLayer`s",
    instead="`wara_peft.rescale_adapter_scale`",
)(partial(rescaled, helper=rescale_adapter_scale))


@row("`rescale_adapter_scale`, each method's own")
def own_rescale(method: Method) -> str | None:
    return rescaled(method, wara_peft.rescale_adapter_scale if method is WARA else rescale_adapter_scale)


@row(
    "`reduce_intruder_dimension`",
    wara="refused: The provided model is not using LoRA and is therefore not supported.",
    instead="a model with the LoRA of `wara_peft.save_as_lora`",
)
def intruders(method: Method) -> str | None:
    model = adapted(method)
    reduce_intruder_dimension(model, logging_sink=None)
    assert "intruder_reduced" in model.peft_config
    for name in model.peft_config:
        model.set_adapter(name)
        output(model)


@row("`find_kappa_target_modules`, for `target_modules`")
def kappa(method: Method) -> str | None:
    targets = find_kappa_target_modules(llama(), top_p=0.3, show_progress=False)["target_modules"]
    train(adapted(method, llama(), target_modules=targets), WORDS)


@row("`disable_input_dtype_casting`")
def casting(method: Method) -> str | None:
    model = adapted(method)
    with disable_input_dtype_casting(model):
        output(model)
        assert not any(layer.cast_input_dtype_enabled for layer in layers_of(model, method).values())
    assert all(layer.cast_input_dtype_enabled for layer in layers_of(model, method).values())


@row("`cast_mixed_precision_params`")
def mixed_precision(method: Method) -> str | None:
    model = adapted(method, llama())
    cast_mixed_precision_params(model, torch.float16)
    assert all(
        value.dtype == (torch.float32 if value.requires_grad else torch.float16) for value in model.parameters()
    )


@row("`update_signature`")
def signature(method: Method) -> str | None:
    import inspect

    model = adapted(method, llama())
    update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters


@row("`print_trainable_parameters`")
def trainable(method: Method) -> str | None:
    trained, everything = adapted(method).get_nb_trainable_parameters()
    of_base = sum(value.numel() for value in mlp().parameters())
    assert 0 < trained == everything - of_base


@row("`model.double()`")
def double(method: Method) -> str | None:
    model = adapted(method, mlp().float()).double()
    assert model(X).dtype == torch.float64


AREA.shown_in(
    "a server that rolls out the policy of each step",
    "tests/lora/test_rollouts.py",
    inside=WORKS,
    inside_test="tests/lora/test_rollouts.py",
)
AREA.shown_in(
    "TRL's sync to vLLM, of the adapter only",
    "tests/lora/test_rollouts.py",
    wara="refused: supports LoRA adapters only, got `WaRAConfig`",
    instead="inside LoRA, or TRL's sync of merged weights",
    inside=WORKS,
    inside_test="tests/lora/test_reparametrize_tools.py",
)
AREA.shown_in("the ranks that vLLM takes, of exported adapters", "tests/lora/test_export.py")
AREA.shown_in(
    "programs that cannot be edited: `wara-peft run`",
    "tests/cli/test_running.py",
    inside=WORKS,
    inside_test="tests/cli/test_run_reparametrize.py",
)
