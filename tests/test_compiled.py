"""Compiled models have the names of the plain ones: in configs, in files, in reports, and in both directions."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models import llama
from wara_peft import (
    WaRAConfig,
    allocate_ranks,
    initialize_from_data,
    load_lora,
    optimizer_groups,
    save_as_lora,
    to_lora,
)
from wara_peft.compression import Activation, calibrate, compress, load_compressed, save_compressed

pytestmark = pytest.mark.usefixtures("traced_nothing")
TOKENS = torch.arange(1, 13).view(2, 6)
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


@pytest.fixture
def traced_nothing(request):
    """Compiled modules run uncompiled, which saves minutes; tests that are marked `slow` compile."""
    if request.node.get_closest_marker("slow"):
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


def base() -> nn.Module:
    return llama(eos_token_id=None, num_key_value_heads=2)


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def blocks(model: nn.Module) -> nn.Module:
    layers = layers_of(model)
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return model


def blocks_in_place(model: nn.Module) -> nn.Module:
    for layer in layers_of(model):
        layer.compile(backend="eager")
    return model


def blocks_and_whole(model: nn.Module) -> nn.Module:
    return whole(blocks(model))


def single_layers(model: nn.Module) -> nn.Module:
    """Target modules by themselves."""
    for layer in layers_of(model):
        layer.mlp.down_proj = torch.compile(layer.mlp.down_proj, backend="eager")
    return model


WAYS = [whole, in_place, blocks, blocks_in_place, blocks_and_whole, single_layers]
CONFIGS = {
    "all-linear": {"target_modules": "all-linear"},
    "by name": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "down_proj"],
        "exclude_modules": ["layers.0.mlp.down_proj"],
        "rank_pattern": {"^model.layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    "by layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "heads": {"target_modules": r"model\.layers\.\d\.mlp\.(up|down)_proj", "modules_to_save": ["lm_head"], "r": 2},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 5]},
    "tiny": {"target_modules": ["v_proj"], "form": "tiny", "r": 2, "save_basis": False},
    "factors": {"target_modules": ["v_proj"], "bias": "all"},
}


def adapt(model: nn.Module, **fields) -> PeftModel:
    torch.manual_seed(1)
    adapted = get_peft_model(model, WaRAConfig(init_weights=False, task_type="CAUSAL_LM", **fields)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return adapted


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def saved(model: PeftModel, path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    model.save_pretrained(path)
    return load_file(path / "adapter_model.safetensors"), json.loads((path / "adapter_config.json").read_text())


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_of_a_compiled_base_is_that_of_the_plain_one(way, fields, tmp_path):
    plain, compiled = adapt(base(), **fields), adapt(way(base()), **fields)
    expected, expected_config = saved(plain, tmp_path / "plain")
    found, config = saved(compiled, tmp_path / "compiled")
    assert config == expected_config
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key])
    torch.testing.assert_close(logits(compiled), logits(plain))

    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path / "compiled")), logits(plain))
    onto = PeftModel.from_pretrained(way(base()), tmp_path / "plain")
    torch.testing.assert_close(logits(onto), logits(plain))
    again = adapt(way(base()), target_modules=["o_proj"])
    again.load_adapter(tmp_path / "plain", "second")
    again.set_adapter("second")
    torch.testing.assert_close(logits(again), logits(plain))


@pytest.mark.parametrize("way", [*WAYS[:-1]])
def test_an_adapted_model_that_is_compiled_keeps_its_names(way, tmp_path):
    fields = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.1.mlp.down_proj": 2}}
    plain, compiled = adapt(base(), **fields), way(adapt(base(), **fields))
    expected, expected_config = saved(plain, tmp_path / "plain")
    found, config = saved(compiled, tmp_path / "compiled")
    assert config == expected_config
    assert {key: tensor.tolist() for key, tensor in found.items()} == {
        key: tensor.tolist() for key, tensor in expected.items()
    }
    lora, tensors = to_lora(compiled)
    expected_lora, expected_tensors = to_lora(plain)
    assert lora.to_dict() == expected_lora.to_dict()
    assert tensors.keys() == expected_tensors.keys()
    save_as_lora(tmp_path / "lora", compiled)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path / "lora")), logits(plain))
    groups, expected_groups = (optimizer_groups(model, lr=1e-3, lr_ratio=2) for model in (compiled, plain))
    assert [len(group["params"]) for group in groups] == [len(group["params"]) for group in expected_groups]

    with torch.no_grad():
        for name, parameter in compiled.named_parameters():
            if "wara_" in name:
                parameter.zero_()
    compiled.load_adapter(tmp_path / "plain", "default")
    torch.testing.assert_close(logits(compiled), logits(plain))
    compiled.add_weighted_adapter(["default"], [2.0], "twice", "cat")
    plain.add_weighted_adapter(["default"], [2.0], "twice", "cat")
    assert saved(compiled, tmp_path / "a")[1] == saved(plain, tmp_path / "b")[1]
    merged = compiled.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-4, atol=1e-5)


def test_files_that_have_the_wrappers_name_load(tmp_path):
    """Give keys the prefix that 0.1.0 wrote beside compiled bases."""
    plain = adapt(base(), **CONFIGS["by name"])
    tensors, config = saved(plain, tmp_path)
    prefix = "base_model.model."
    old = {key.replace(prefix, f"{prefix}_orig_mod."): tensor for key, tensor in tensors.items()}
    for field in ("module_shapes", "rank_pattern"):
        config[field] = {f"^_orig_mod.{name.removeprefix('^')}": value for name, value in config[field].items()}
    config["module_shapes"] = {name.removeprefix("^"): value for name, value in config["module_shapes"].items()}
    config["target_modules"] = [f"_orig_mod.{n}" if n.startswith("model") else n for n in config["target_modules"]]
    save_file(old, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for model in (base(), whole(base())):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(model, tmp_path)), logits(plain))
    _, from_disk = to_lora(tmp_path)
    _, from_model = to_lora(plain)
    assert from_disk.keys() == from_model.keys()


class Counting:
    """A backend that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


@pytest.mark.slow
@pytest.mark.parametrize("of_blocks", [False, True])
def test_what_was_compiled_goes_on_being_compiled(of_blocks):
    torch.compiler.reset()
    model, backend = base(), Counting()
    compiled = torch.compile(model, backend=backend)
    if of_blocks:
        layers_of(model)[1] = torch.compile(layers_of(model)[1], backend=backend)
        compiled = model
    adapted = adapt(compiled, target_modules=["q_proj"])
    expected = logits(adapt(base(), target_modules=["q_proj"]))
    torch.testing.assert_close(logits(adapted), expected)
    assert backend.graphs > 0
    torch.testing.assert_close(logits(compiled), expected)  # by the name that the user has for it


def test_an_adapter_that_is_refused_leaves_the_model_compiled():
    model = blocks(base())
    before = [*layers_of(model)]
    with pytest.raises(ValueError, match="level1"):
        get_peft_model(model, WaRAConfig(target_modules=["q_proj"]), adapter_name="level1")
    assert [*layers_of(model)] == before
    assert all(layer._orig_mod._compiled_call_impl is None for layer in before)
    assert not hasattr(base(), "peft_config")


@pytest.mark.parametrize("way", WAYS)
def test_ranks_are_allocated_alike(way):
    compiled = way(base())
    config = WaRAConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)
    found, report = allocate_ranks(compiled, config, [BATCH], budget=900)
    expected, expected_report = allocate_ranks(base(), config, [BATCH], budget=900)
    assert found == expected
    assert [module.name for module in report.modules] == [module.name for module in expected_report.modules]
    like = LoraConfig(target_modules="all-linear", r=2)
    assert allocate_ranks(compiled, config, [BATCH], like=like)[1].budget == 2 * 2 * (4 * 32 + 3 * 40)
    names = [name for name, _ in compiled.named_modules()]
    assert any("_orig_mod" in name for name in names) == (way not in (in_place, blocks_in_place))


@pytest.mark.filterwarnings("ignore:.*positions")
@pytest.mark.parametrize("way", WAYS)
def test_models_are_compressed_alike(way, tmp_path):
    compiled, plain = way(base()), base()
    found, expected = (calibrate(model, [BATCH], statistics=["inputs"]) for model in (compiled, plain))
    assert found.keys() == expected.keys()
    for name, entry in found.items():
        torch.testing.assert_close(entry.moment, expected[name].moment)
    for model, statistics in ((compiled, found), (plain, expected)):
        compress(model, Activation(0.6), statistics)
    torch.testing.assert_close(logits(compiled), logits(plain))
    save_compressed(compiled, tmp_path / "model")
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "model" / "model.safetensors"))
    torch.testing.assert_close(logits(load_compressed(tmp_path / "model")), logits(plain))


@pytest.mark.parametrize("way", [whole, blocks])
def test_first_values_come_from_data_alike(way):
    fields = {"target_modules": ["q_proj"], "init_weights": "activation", "task_type": "CAUSAL_LM"}
    compiled, plain = way(get_peft_model(base(), WaRAConfig(**fields))), get_peft_model(base(), WaRAConfig(**fields))
    for model in (compiled, plain):
        initialize_from_data(model, [BATCH], show_progress_bar=False)
    found, expected = (
        {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters() if "wara_A" in name}
        for model in (compiled, plain)
    )
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter)


@pytest.mark.parametrize("way", WAYS)
def test_a_lora_loads_onto_a_compiled_base(way, tmp_path):
    lora = get_peft_model(base(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    loaded = load_lora(way(base()), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(lora.eval()))
    assert saved(loaded, tmp_path / "wara")[1]["module_shapes"].keys() == {
        f"model.layers.{index}.{name}" for index in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    second = whole(adapt(base(), target_modules=["q_proj"]))
    more = load_lora(second, tmp_path / "lora", "second")
    assert isinstance(more, PeftModel)
    assert not isinstance(more.base_model.model, PeftModel)
    more.set_adapter("second")
    torch.testing.assert_close(logits(more), logits(lora.eval()))


@pytest.mark.parametrize("way", WAYS)
def test_adapters_that_transformers_adds(way, tmp_path):
    compiled, plain = way(base()), base()
    for model in (compiled, plain):
        torch.manual_seed(3)
        model.add_adapter(WaRAConfig(target_modules=["q_proj", "down_proj"], init_weights=False))
    compiled.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys == {f"base_model.model.{name}" for name in _names_of_factors(plain)}
    loaded = way(base())
    loaded.load_adapter(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(plain))


def _names_of_factors(model: nn.Module) -> set[str]:
    names = {name for name, _ in model.named_parameters() if "wara_" in name}
    return {name.replace(".default", "") for name in names}


@pytest.mark.filterwarnings("ignore:.*positions")
@pytest.mark.slow
def test_hooks_are_called_in_a_model_that_has_been_compiled():
    torch.compiler.reset()
    compiled = whole(base())
    logits(compiled)
    found, expected = (calibrate(model, [BATCH], statistics=["inputs"]) for model in (compiled, base()))
    for name, entry in expected.items():
        torch.testing.assert_close(found[name].moment, entry.moment)


def test_copies_of_a_model_with_compiled_blocks():
    adapted = adapt(blocks(base()), target_modules=["q_proj"])
    torch.testing.assert_close(logits(copy.deepcopy(adapted)), logits(adapted))
