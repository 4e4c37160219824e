"""Rows about the fields of the configs."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    PeftConfig,
    VeloraConfig,
    get_peft_model,
)
from transformers import HfArgumentParser

from tests.models import WORDS, llama
from wara_peft import WaRAConfig
from wara_peft.config_fields.from_lora import LORA_FIELDS

from . import same_factors
from .models import ATTENTION, X, adapted, layers_of, output, run, train
from .table import INSIDE, REFUSED, WARA, Area, Method

AREA = Area("Configuration")
row = AREA.row


@row(
    "`r=16, lora_alpha=32` with the fields renamed",
    wara="differs: scaling 0.5 and 2 times the parameters, of which a warning tells",
    instead="`WaRAConfig.from_lora(lora_config)`: alpha is divided by R = (3 levels + 1) r",
    inside="differs: scaling 2 and 0.5 times the parameters, which is what it is for",
)
def numbers(method: Method) -> str | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = method.config(r=16, alpha=32, target_modules=["up"])
    warned = any("from_lora" in str(warning.message) for warning in caught)
    base = torch.nn.ModuleDict({"up": torch.nn.Linear(32, 32)})
    model = get_peft_model(base, config)
    method.finish(model, "default")
    scaling = next(iter(layers_of(model, method).values())).scaling["default"]
    ratio = model.get_nb_trainable_parameters()[0] / (16 * (32 + 32))
    if (scaling, ratio) == (2, 1):
        return None
    if method is INSIDE:
        return f"scaling {scaling:g} and {ratio:g} times the parameters, which is what it is for"
    return f"scaling {scaling:g} and {ratio:g} times the parameters" + (", of which a warning tells" if warned else "")


@row("the config of a LoRA with `r=16, lora_alpha=32`, carried over by `WaRAConfig.from_lora`")
def carried_over(method: Method) -> str | None:
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["up"], lora_dropout=0.1)
    base = torch.nn.ModuleDict({"up": torch.nn.Linear(32, 32)})
    model = get_peft_model(base, WaRAConfig.from_lora(config) if method is WARA else config)
    method.finish(model, "default")
    assert next(iter(layers_of(model, method).values())).scaling["default"] == 2
    assert model.get_nb_trainable_parameters()[0] == (8 if method is INSIDE else 16) * (32 + 32)


@row("`use_rslora`")
def rslora(method: Method) -> str | None:
    model = adapted(method, alpha=6, use_rslora=True)
    for layer in layers_of(model, method).values():
        assert abs(layer.scaling["default"] - 6 / layer.r["default"] ** 0.5) < 1e-6
    output(model)


@row("`rank_pattern`, `alpha_pattern`")
def patterns(method: Method) -> str | None:
    model = adapted(method, r=4, rank_pattern={"down": 6}, alpha_pattern={"up": 5})
    layers = layers_of(model.base_model.model, method)
    assert layers["down"].r["default"] == 1.5 * layers["up"].r["default"]
    assert layers["up"].scaling["default"] == 5 / layers["up"].r["default"]
    output(model)


@row("dropout")
def dropout(method: Method) -> str | None:
    model = adapted(method, dropout=0.5)
    assert torch.equal(output(model), output(model))
    assert not torch.equal(model.train()(X), model(X))
    train(model)


def named_targets(method: Method, expected: set[str], **fields: Any) -> None:
    model = adapted(method, llama(), **fields)
    assert {name.removeprefix("base_model.model.model.") for name in layers_of(model, method)} == expected
    train(model, WORDS)


BY_LAYER = {f"layers.{index}.self_attn.{name}" for index in (0, 1) for name in ATTENTION}
row("`target_modules` as a list of names")(partial(named_targets, expected=BY_LAYER, target_modules=ATTENTION))
row("`target_modules` as a regular expression")(
    partial(named_targets, expected=BY_LAYER, target_modules=r".*self_attn\.[qv]_proj")
)
row("`target_modules=None` for known architectures")(partial(named_targets, expected=BY_LAYER, target_modules=None))
row("`exclude_modules`")(
    partial(
        named_targets,
        expected=BY_LAYER,
        target_modules="all-linear",
        exclude_modules=["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
)
row("`layers_to_transform`, `layers_pattern`")(
    partial(
        named_targets,
        expected={f"layers.1.self_attn.{name}" for name in ATTENTION},
        layers_to_transform=[1],
        layers_pattern="layers",
    )
)


@row('`target_modules="all-linear"`')
def all_linear(method: Method) -> str | None:
    model = adapted(method, llama(), target_modules="all-linear")
    assert len(layers_of(model, method)) == 14
    train(model, WORDS)


@row(
    "`modules_to_save`",
)
def modules_to_save(method: Method) -> str | None:
    model = adapted(method, modules_to_save=["head"])
    train(model)
    head = model.base_model.model.head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


@row('`bias="all"`')
def all_biases(method: Method) -> str | None:
    model = adapted(method, bias="all")
    trained = {name for name, value in model.named_parameters() if value.requires_grad and "bias" in name}
    assert len(trained) == 2
    train(model)


@row(
    '`bias="lora_only"`',
    wara="refused: bias='lora_only' is called bias='wara_only' here",
    instead='`bias="wara_only"`',
)
def biases_by_loras_name(method: Method) -> str | None:
    train(adapted(method, bias="lora_only"))


@row("the biases of adapted layers, under the method's own name")
def own_biases(method: Method) -> str | None:
    model = adapted(method, bias=f"{method.prefix}_only")
    trained = {name for name, value in model.named_parameters() if value.requires_grad and "bias" in name}
    assert trained == {"base_model.model.up.base_layer.bias"}
    train(model)


@row("`trainable_token_indices`")
def tokens(method: Method) -> str | None:
    model = adapted(method, llama(), trainable_token_indices=[3, 5])
    train(model, WORDS)
    weight = model.get_input_embeddings().token_adapter.get_merged_weights(["default"])
    changed = (weight != llama().get_input_embeddings().weight).any(1).nonzero().flatten()
    assert changed.tolist() == [3, 5]


@row(
    "`ensure_weight_tying`, the embedding and the tied head adapted together",
    inside="refused: its factors are tied to those of another module",
)
def weight_tying(method: Method) -> str | None:
    model = adapted(method, llama(tie_word_embeddings=True), target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert len(layers_of(model, method)) == 2
    train(model, WORDS)


def starts(method: Method, init: Any) -> None:
    model = adapted(method, init=init)
    train(model)


MEANT = "refused: (init_lora_weights={!r} gives the first values a meaning) that cannot be taken over exactly"
for init in (True, False, "orthogonal"):
    row(
        f"`init_lora_weights={init!r}`, `init_weights={init!r}` here",
        inside=None if isinstance(init, bool) else MEANT.format(init),
    )(partial(starts, init=init))
for init in ("gaussian", "pissa", "olora"):
    row(
        f'`init_lora_weights="{init}"`',
        wara=f"refused: init_weights='{init}' must be one of True, False, 'orthogonal', 'activation'",
        instead="`True`, or one of the others",
        inside=None if init == "gaussian" else MEANT.format(init),
        dtype=torch.float32,
    )(partial(starts, init=init))


def has_field(method: Method, name: str, value: Any) -> None:
    model = adapted(method, llama(num_key_value_heads=2), **{name: value})
    loss = run(model.train(), WORDS | {"use_cache": False}).square().sum()
    loss.backward()
    same_factors.meet(loss)
    same_factors.meet_gradients(model)
    assert any(value.grad is not None for value in model.parameters())


for name, value in (
    ("use_dora", True),
    ("lora_bias", True),
    ("layer_replication", [(0, 2), (1, 2)]),
    ("alora_invocation_tokens", [5]),
    ("use_qalora", True),
    ("use_bdlora", BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=ATTENTION, nblocks=2)),
    ("monteclora_config", MontecloraConfig()),
    ("velora_config", VeloraConfig(num_groups=4)),
    ("kasa_config", KasaConfig()),
    ("runtime_config", LoraRuntimeConfig()),
    ("fan_in_fan_out", False),
):
    row(
        f"the field `{name}`",
        wara=f"refused: WaRAConfig got an unexpected keyword argument '{name}'",
        instead=LORA_FIELDS[name],
        inside=f"{REFUSED}is a BlockDiagonalLinear, which cannot be" if name == "use_bdlora" else None,
    )(partial(has_field, name=name, value=value))


@row("layers replicated as `layer_replication` does it, before the adapter is added")
def replicated(method: Method) -> str | None:
    from peft.tuners.tuners_utils import replicate_layers

    base = llama()
    replicate_layers(base, [[0, 2], [1, 2]])
    model = adapted(method, base)
    assert len(layers_of(model, method)) == 6
    train(model, WORDS | {"use_cache": False})


@row("a config in JSON, read by `PeftConfig.from_pretrained`")
def json(method: Method, directory: Path) -> str | None:
    config = method.config(r=3, target_modules=["up"], rank_pattern={"up": 2}, modules_to_save=["head"])
    config.save_pretrained(directory)
    read = PeftConfig.from_pretrained(directory)
    assert type(read) is method.config_class and read.to_dict() == config.to_dict()


@row("`HfArgumentParser` on the config's class", lora="differs: it takes no annotation such as `bool | Literal[...]`")
def command_line(method: Method) -> str | None:
    try:
        parser = HfArgumentParser(method.config_class)
    except (TypeError, ValueError):  # which of the two depends on what typing has kept
        return "it takes no annotation such as `bool | Literal[...]`"
    (config,) = parser.parse_args_into_dataclasses(["--r", "2"], look_for_args_file=False)
    assert config.r == 2


@row("`target_modules` of which none is in the model", *["refused: Target modules {'nothing'} not found"] * 2)
def no_match(method: Method) -> str | None:
    adapted(method, target_modules=["nothing"])
