"""Rows about saving and loading."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    convert_to_lora,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model
from transformers import AutoModelForCausalLM

from tests.models import WORDS, llama, mlp

from .models import ATTENTION, adapted, add, close, layers_of, output, train
from .table import WARA, WORKS, Area, Method

AREA = Area("Saving and loading")
row = AREA.row


@row("`save_pretrained`, `PeftModel.from_pretrained`")
def save_and_load(method: Method, directory: Path) -> str | None:
    model = adapted(method, modules_to_save=["head"])
    model.save_pretrained(directory)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in directory.iterdir()} == files | method.saved_too
    loaded = PeftModel.from_pretrained(mlp(), directory)
    assert torch.equal(output(loaded), output(model))
    assert not any(value.requires_grad for value in loaded.parameters())
    trained = PeftModel.from_pretrained(mlp(), directory, is_trainable=True)
    method.finish(trained, "default")
    assert close(output(trained), output(model), 1e-10)
    train(trained)


@row("`save_pretrained(safe_serialization=False)`, which PEFT loads")
def pickled(method: Method, directory: Path) -> str | None:
    model = adapted(method)
    model.save_pretrained(directory, safe_serialization=False)
    assert torch.equal(output(PeftModel.from_pretrained(mlp(), directory)), output(model))


@row("several adapters in one directory, and `load_adapter`")
def named(method: Method, directory: Path) -> str | None:
    model = adapted(method)
    add(model, method, "other", target_modules=["up"])
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(mlp(), directory)
    loaded.load_adapter(directory / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(output(loaded), output(model))


@row("`from_pretrained(…, subfolder=…, adapter_name=…)`")
def subfolder(method: Method, directory: Path) -> str | None:
    model = adapted(method)
    model.save_pretrained(directory / "inside")
    loaded = PeftModel.from_pretrained(mlp(), directory, subfolder="inside", adapter_name="named")
    assert loaded.active_adapter == "named" and torch.equal(output(loaded), output(model))


@row("a repository of the Hub, in the cache, by its name")
def hub(method: Method, directory: Path) -> str | None:
    model, revision = adapted(method), "0" * 40
    repository = directory / "models--someone--adapter"
    model.save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    loaded = PeftModel.from_pretrained(mlp(), "someone/adapter", cache_dir=directory)
    assert torch.equal(output(loaded), output(model))


@row("`AutoPeftModelForCausalLM`")
def auto(method: Method, directory: Path) -> str | None:
    llama().save_pretrained(directory / "base")
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    model = adapted(method, base, task_type="CAUSAL_LM")
    model.save_pretrained(directory / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(directory / "adapter")
    assert torch.equal(output(loaded, WORDS), output(model, WORDS))


@row("`from_pretrained` of transformers on the adapter's directory")
def transformers_loads(method: Method, directory: Path) -> str | None:
    llama().save_pretrained(directory / "base")
    model = adapted(method, AutoModelForCausalLM.from_pretrained(directory / "base"))
    model.save_pretrained(directory / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(directory / "adapter")
    assert layers_of(loaded, method)
    assert close(output(loaded, WORDS), output(model, WORDS))


@row("transformers' `add_adapter`, `save_pretrained`, `load_adapter`, `set_adapter`, `disable_adapters`")
def of_transformers(method: Method, directory: Path) -> str | None:
    model, plain = llama(), llama()
    model.add_adapter(method.config(False, target_modules=ATTENTION))
    method.finish(model, "default")
    model.save_pretrained(directory)
    plain.load_adapter(str(directory), "saved")
    assert close(output(plain, WORDS), output(model, WORDS))
    plain.disable_adapters()
    assert torch.equal(output(plain, WORDS), output(llama(), WORDS))
    plain.enable_adapters()
    plain.set_adapter("saved")
    assert close(output(plain, WORDS), output(model, WORDS))


@row("`get_peft_model_state_dict`, `set_peft_model_state_dict`")
def state_dicts(method: Method) -> str | None:
    model, other = adapted(method), adapted(method, init=True)
    tensors = get_peft_model_state_dict(model)
    assert all(f".{method.prefix}_" in key and "default" not in key for key in tensors)
    result = set_peft_model_state_dict(other, tensors)
    assert not result.unexpected_keys
    assert torch.equal(output(other), output(model))


@row("`inject_adapter_in_model` with a state dict")
def injected(method: Method) -> str | None:
    model = adapted(method)
    tensors = get_peft_model_state_dict(model)
    bare = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    base = inject_adapter_in_model(method.config(target_modules=["up", "down"]), mlp(), state_dict=bare)
    method.finish(base, "default")
    set_peft_model_state_dict(base, bare)
    assert torch.equal(output(base), output(model))


@row(
    "`save_pretrained(path_initial_model_for_weight_conversion=…)`, after PiSSA and its kind",
    wara="refused: WaRA's leave them as they are, so there is nothing to convert: save without it",
    instead="`save_pretrained` without it",
    inside="refused: (init_lora_weights='pissa' gives the first values a meaning)",
    dtype=torch.float32,
)
def mutated(method: Method, directory: Path) -> str | None:
    model = adapted(method, init=True if method is WARA else "pissa")
    model.save_pretrained(directory / "first")
    train(model)
    model.save_pretrained(directory / "last", path_initial_model_for_weight_conversion=str(directory / "first"))
    assert close(output(PeftModel.from_pretrained(mlp(), directory / "last")), output(model), 1e-4)


@row("`peft.convert_to_lora` and `peft.save_as_lora`, by SVD")
def converted(method: Method, directory: Path) -> str | None:
    model = adapted(method)
    config, tensors = convert_to_lora(model, rank=12)
    assert config.r == 12 and all("lora_" in key for key in tensors)
    save_as_lora(directory, model, rank=12)
    assert close(output(PeftModel.from_pretrained(mlp(), directory)), output(model), 1e-4)


@row("an exact LoRA of the adapter, by `wara_peft.save_as_lora`")
def exported(method: Method, directory: Path) -> str | None:
    model = adapted(method)
    model.save_pretrained(directory / "adapter")
    path = method.as_lora(directory / "adapter")
    assert close(output(PeftModel.from_pretrained(mlp(), path)), output(model))


@row("`helpers.check_if_peft_model` on a directory")
def is_peft_model(method: Method, directory: Path) -> str | None:
    adapted(method).save_pretrained(directory)
    assert check_if_peft_model(str(directory))


@row(
    "an adapter made for modules of another shape, loaded",
    lora="refused: size mismatch",
    wara="refused: The saved adapter was made for modules of other (out, in) shapes: 'up'",
)
def other_shape(method: Method, directory: Path) -> str | None:
    adapted(method).save_pretrained(directory)
    from tests.references import Mlp

    PeftModel.from_pretrained(Mlp(width=16), directory)


AREA.shown_in(
    "loading in a process that does not import `wara_peft`",
    "tests/test_plugin_hook.py",
    wara="refused: KeyError: 'WARA'",
    instead="`import wara_peft`, `wara-peft run`, `SaveAsLora`, or inside LoRA",
    inside=WORKS,
    inside_test="tests/lora/test_reparametrize_checkpoints.py",
)
AREA.shown_in(
    "checkpoints of `Trainer` that load without the plugin, by `SaveAsLora`",
    "tests/lora/test_checkpoint_callback.py",
    inside=WORKS,
    inside_test="tests/lora/test_reparametrize_checkpoints.py",
)
