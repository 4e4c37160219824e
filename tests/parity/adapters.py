"""Rows about several adapters in one model, and about what makes one of several."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    ArrowConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    XLoraConfig,
    create_arrow_model,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter

from tests.models import WORDS, llama, mlp
from wara_peft import save_as_lora

from .models import X, adapted, add, close, output, train
from .table import LORA, REFUSED, WARA, Area, Method

AREA = Area("Several adapters")
row = AREA.row


def two(method: Method, **fields: Any) -> PeftModel:
    model = adapted(method, **fields)
    add(model, method, "other", target_modules=["up"])
    return model.eval()


def alone(model: PeftModel, name: str) -> torch.Tensor:
    model.set_adapter(name)
    return output(model)


@row("`add_adapter`, `set_adapter`, `delete_adapter`")
def switching(method: Method) -> str | None:
    model = two(method)
    outputs = {name: alone(model, name) for name in ("default", "other")}
    assert not close(outputs["default"], outputs["other"])
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"] and torch.equal(output(model), outputs["other"])


@row("`disable_adapter`")
def disabled(method: Method) -> str | None:
    model = adapted(method)
    expected = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(mlp()))
    assert torch.equal(output(model), expected)


@row("two adapters active at once")
def both(method: Method) -> str | None:
    model = two(method)
    layer = model.base_model.model.up
    model.base_model.set_adapter(["default", "other"])
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert close(layer(X), layer.base_layer(X) + X @ delta.T)
    output(model)


@row("a frozen copy of an adapter from its config and values, as TRL's DPO and GRPO make their reference")
def reference(method: Method) -> str | None:
    model = adapted(method)
    model.add_adapter("ref", model.peft_config["default"])  # which is then of the same kind
    values = dict(model.named_parameters())
    for name, value in values.items():
        if ".default." in name:
            values[name.replace(".default.", ".ref.")].data.copy_(value.data)
    expected = output(model)
    train(model)
    assert not close(output(model), expected, 1e-3)
    assert torch.equal(alone(model, "ref"), expected)


@row("`set_requires_grad` by adapter")
def requires_grad(method: Method) -> str | None:
    model = two(method)
    model.set_requires_grad("other")
    assert all(value.requires_grad for name, value in model.named_parameters() if ".other." in name)
    train(model)


@row("a batch of several adapters, by `adapter_names`")
def mixed_batch(method: Method) -> str | None:
    model = two(method)
    names = ["other", "default", "__base__", "other"]
    expected = {name: alone(model, name) for name in ("default", "other")} | {"__base__": output(mlp())}
    found = output(model, adapter_names=names)
    assert all(close(found[index], expected[name][index]) for index, name in enumerate(names))


@row(
    "`adapter_names` in training mode",
    *["refused: Cannot pass `adapter_names` when the model is in training mode."] * 2,
)
def mixed_training(method: Method) -> str | None:
    two(method).train()(X, adapter_names=["default"] * 4)


@row("`add_weighted_adapter` by default: of two adapters one of their rank")
def weighted_by_default(method: Method) -> str | None:
    rank = 2 if method is WARA else 4
    model = two(method, r=rank)
    add(model, method, "third", r=rank, target_modules=["up", "down"])
    model.add_weighted_adapter(["default", "third"], [0.5, 0.5], "new")
    layer = model.base_model.model.up
    assert layer.r["new"] == layer.r["default"] == layer.r["third"]
    alone(model, "new")


TYPES: dict[str, dict[str, Any]] = {
    "svd": {"svd_rank": 12},
    "cat": {},
    "linear": {},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5, "svd_rank": 4},
    "dare_linear": {"density": 0.5},
    "dare_linear_svd": {"density": 0.5, "svd_rank": 4},
    "dare_ties": {"density": 0.5},
    "dare_ties_svd": {"density": 0.5, "svd_rank": 4},
    "magnitude_prune": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.5, "svd_rank": 4},
}


def weighted(method: Method, kind: str, options: dict[str, Any]) -> None:
    model = adapted(method, r=4)
    add(model, method, "other", r=4, target_modules=["up", "down"])
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "new", kind, **options)
    layer = model.base_model.model.up
    if kind in ("svd", "cat"):
        expected = 0.5 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("other")
        assert close(layer.get_delta_weight("new"), expected)
    assert not close(alone(model, "new"), output(mlp()), 1e-3)


for kind, options in TYPES.items():
    row(f'`add_weighted_adapter(…, combination_type="{kind}")`, with a negative weight')(
        partial(weighted, kind=kind, options=options)
    )


@row(
    "`add_weighted_adapter` under a name that is taken",
    lora="differs: nothing happens",
    wara="refused: Adapter other already exists",
    instead="another name, or `delete_adapter` first",
)
def taken(method: Method) -> str | None:
    model = two(method)
    before = alone(model, "other")
    model.add_weighted_adapter(["default"], [0.5], "other")
    return "nothing happens" if torch.equal(alone(model, "other"), before) else None


@row(
    "hotswap",
    wara="refused: Hotswapping only supports LORA but WARA was passed.",
    instead="`reparametrize_lora`; `load_adapter` and `set_adapter`",
)
def hotswap(method: Method, directory: Path) -> str | None:
    model = adapted(method)
    model.save_pretrained(directory)
    other = adapted(method, init=True)
    hotswap_adapter(other, directory, "default")
    assert torch.equal(output(other), output(model))


@row("a hotswap of the adapter as a LoRA")
def hotswap_exported(method: Method, directory: Path) -> str | None:
    model = adapted(method)
    save_as_lora(directory, model) if method is WARA else model.save_pretrained(directory)
    other = get_peft_model(mlp(), LoraConfig.from_pretrained(directory))
    hotswap_adapter(other, directory, "default")
    assert close(output(other), output(model))


@row(
    "`PeftMixedModel`, `get_peft_model(…, mixed=True)`",
    wara="refused: The provided `peft_type` 'WARA' is not compatible with the `PeftMixedModel`.",
    instead="`inject_adapter_in_model` once for each method",
)
def mixed(method: Method) -> str | None:
    torch.manual_seed(1)
    model = get_peft_model(mlp(), method.config(False, target_modules=["up"]), mixed=True)
    method.finish(model, "default")
    model.add_adapter("other", LoHaConfig(init_weights=False, target_modules=["up", "down"]))
    for names in ("default", "other", ["default", "other"]):
        model.set_adapter(names)
        assert not close(output(model), output(mlp()), 1e-3)
    train(model)


@row("an adapter of another method beside it (LoHa beside LoRA, LoRA beside WaRA), by `inject_adapter_in_model`")
def two_methods(method: Method) -> str | None:
    other = LoHaConfig(init_weights=False, target_modules=["up", "down"])
    if method is WARA:
        other = LoraConfig(init_lora_weights=False, target_modules=["up", "down"])
    torch.manual_seed(1)
    model = inject_adapter_in_model(method.config(False, target_modules=["up"]), mlp(), "first")
    method.finish(model, "first")
    outputs = [output(mlp()), output(model)]
    inject_adapter_in_model(other, model, "second")
    outputs.append(output(model))
    assert not close(outputs[0], outputs[1], 1e-3) and not close(outputs[1], outputs[2], 1e-3)
    train(model)


@row(
    "adapters of two methods in one `PeftModel`",
    lora="refused: Cannot combine adapters with different peft types.",
    wara="refused: Cannot combine adapters with different peft types.",
    instead="`inject_adapter_in_model` once for each method",
)
def other_type(method: Method) -> str | None:
    other = LORA if method is WARA else WARA
    adapted(method).add_adapter("other", other.config(target_modules=["up"]))


def saved(method: Method, directory: Path) -> Path:
    adapted(method, llama(), task_type="CAUSAL_LM").save_pretrained(directory / "adapter")
    return directory / "adapter"


def xlora(path: str) -> torch.Tensor:
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters={"0": path, "1": path})
    return output(get_peft_model(llama(use_cache=False), config), WORDS)


def arrow(path: str) -> torch.Tensor:
    return output(create_arrow_model(llama(), [path, path], ArrowConfig(top_k=1)), WORDS)


for name, mixture, message in (
    ("X-LoRA", xlora, "What reads it takes only LoRA: give it the adapter as one, by `wara_peft.save_as_lora`"),
    ("Arrow", arrow, "int() argument must be a string, a bytes-like object or a real number, not 'NoneType'"),
):

    def of_adapters(method: Method, directory: Path, mixture: Any = mixture) -> str | None:
        assert not close(mixture(str(saved(method, directory))), output(llama(), WORDS), 1e-3)

    def of_exported(method: Method, directory: Path, mixture: Any = mixture) -> str | None:
        assert not close(mixture(method.as_lora(saved(method, directory))), output(llama(), WORDS), 1e-3)

    row(f"{name} of such adapters", wara=f"{REFUSED}{message}", instead="export them, as in the next row")(of_adapters)
    row(f"{name} of these adapters as LoRAs, by `wara_peft.save_as_lora`")(of_exported)
