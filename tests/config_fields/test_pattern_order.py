"""Patterns that overlap mean the same after saving, whatever the order of their keys in the file."""

from __future__ import annotations

import copy
import json
import random
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from wara_peft import WaRAConfig, load_lora
from wara_peft.config_fields.name_patterns import exact_pattern, in_any_order
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.layers.base import WaRALayer

CONFIG = "adapter_config.json"


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("a", "b", "aa")}) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["a"](torch.tanh(layer["b"](x))) + layer["aa"](x)
        return x


NAMES = [f"layers.{number}.{name}" for number in range(3) for name in ("a", "b", "aa")]
PATTERNS = [
    "layers.1.a",
    "a",
    "b",
    "layers.0.*",
    r"layers\.[12]\..",
    "2.a|1.b",
    "^layers.2",
    ".*a",
    exact_pattern(NAMES[0]),
]
# In an order that sorting changes.
OVERLAPPING = [
    {"layers.1.a": 1, "a": 3},
    {"layers.[12].*": 5, r"layers\.1\.a": 2, "b": 3, ".*a": 1},
    {"z|layers.0.b": 2, "layers.0.a|b": 3, "^layers.0.a+": 4},
    {"layers.1.a": 2, "aa": 2, "a": 3, ".*a": 2},
]


def layers_of(model: nn.Module, layer_class: type = WaRALayer) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, layer_class)}


@pytest.mark.parametrize("names", [NAMES, None])
def test_any_order_means_what_the_first_match_meant(names):
    rng = random.Random(0)
    for _ in range(60):
        chosen = rng.sample(PATTERNS, rng.randint(1, len(PATTERNS)))
        patterns = {pattern: rng.randint(1, 3) for pattern in chosen}
        for field in ("rank_pattern", "alpha_pattern"):
            free = in_any_order(field, patterns, names)
            assert sorted(free.values()) == sorted(patterns.values())
            assert in_any_order(field, free, names) == free or names is None
            for keys in (list(free), sorted(free), sorted(free, reverse=True), rng.sample(list(free), len(free))):
                for name in NAMES:
                    expected = patterns.get(get_pattern_key(list(patterns), name), "none")
                    assert free.get(get_pattern_key(keys, name), "none") == expected, (patterns, name)


def test_what_does_not_overlap_stays_as_it_was_written():
    for patterns in (
        {"q_proj": 1, "k_proj": 2, "layers.3.v_proj": 4},
        {exact_pattern(name): number for number, name in enumerate(NAMES)},
        {"layers.1.a": 4, "a": 4},
    ):
        assert in_any_order("rank_pattern", patterns) == patterns
    assert in_any_order("rank_pattern", {".*b": 1, "a": 2}, NAMES) == {".*b": 1, "a": 2}


def test_exact_patterns_of_many_modules_take_no_time():
    patterns = {exact_pattern(f"model.layers.{number}.q"): number for number in range(600)}
    start = time.monotonic()
    assert in_any_order("rank_pattern", patterns, [f"model.layers.{number}.q" for number in range(600)]) == patterns
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("patterns", OVERLAPPING)
def test_saved_patterns_mean_the_same_in_every_order(patterns, tmp_path):
    fields = {"target_modules": ["a", "b", "aa"], "r": 2, "wara_alpha": 7, "init_weights": False}
    of_ranks = {key: {"aa1": value, "ad1": 0} if value == 3 else value for key, value in patterns.items()}
    model = get_peft_model(Blocks(), WaRAConfig(**fields, rank_pattern=of_ranks, alpha_pattern=patterns)).eval()
    assert model.peft_config["default"].alpha_pattern == patterns
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 8)
    config = json.loads((tmp_path / CONFIG).read_text())
    for turn in (list, lambda items: items[::-1], lambda items: random.Random(1).sample(items, len(items))):
        changed = config | {name: dict(turn(list(config[name].items()))) for name in ("rank_pattern", "alpha_pattern")}
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = PeftModel.from_pretrained(Blocks(), tmp_path).eval()
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
        saved = SavedAdapter(tmp_path)
        for name, layer in layers_of(model.base_model.model).items():
            assert saved.scaling(name) == layer.scaling["default"]
        loaded.save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again" / CONFIG).read_text())
        assert again["rank_pattern"] == config["rank_pattern"] and again["alpha_pattern"] == config["alpha_pattern"]


@pytest.mark.parametrize("patterns", OVERLAPPING)
def test_a_config_that_no_model_has_seen_keeps_its_meaning(patterns, tmp_path):
    config = WaRAConfig(target_modules=["a"], alpha_pattern=patterns, rank_pattern=patterns)
    config.save_pretrained(tmp_path)
    loaded = WaRAConfig.from_pretrained(tmp_path)
    for name in NAMES:
        assert loaded.alpha_of(name) == config.alpha_of(name)
        assert loaded.ranks_of(name) == config.ranks_of(name)


def test_files_with_patterns_as_they_were_written_before_load_as_they_did(tmp_path):
    """By the first match in the order of the file, which PEFT has sorted."""
    fields = {"target_modules": ["a"], "wara_alpha": 7}
    get_peft_model(Blocks(), WaRAConfig(**fields)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {"a": 32, "layers.1.a": 1}}))
    model = PeftModel.from_pretrained(Blocks(), tmp_path)
    assert {layer.wara_alpha["default"] for layer in layers_of(model).values()} == {32}


LORAS = [
    {"alpha_pattern": {"layers.1.a": 1, "a": 32}},
    {"alpha_pattern": {"layers.1.a": 1, "a": 32}, "rank_pattern": {"aa": 6}},
    {"alpha_pattern": {".*a": 5, "layers.1.b": 1}, "rank_pattern": {"^layers.1.b": 6}, "use_rslora": True},
    {"alpha_pattern": {"b": 5}, "rank_pattern": {"layers.1.a": 6, "layers.1.b": 3}},
    {"alpha_pattern": {".*a": 9, "layers.1.a": 2}, "rank_pattern": {"layers.[12].a": 6, "layers.0.*": 3}},
]


def trained_lora(path: Path, **fields) -> PeftModel:
    base = Blocks().double()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b", "aa"], **fields)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("fields", LORAS)
def test_from_lora_has_its_scalings_after_saving_too(fields, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b", "aa"], **fields)
    expected = layers_of(get_peft_model(Blocks(), copy.deepcopy(lora)), LoraLayer)
    model = get_peft_model(Blocks(), WaRAConfig.from_lora(lora))
    model.save_pretrained(tmp_path)
    for found in (model, PeftModel.from_pretrained(Blocks(), tmp_path)):
        for name, layer in layers_of(found).items():
            assert layer.scaling["default"] == pytest.approx(expected[name].scaling["default"], rel=1e-14)


@pytest.mark.filterwarnings("ignore:alpha_pattern of the LoRA")
@pytest.mark.parametrize("fields", LORAS)
def test_a_lora_goes_on_as_peft_loads_it(fields, tmp_path):
    trained_lora(tmp_path, **fields)
    x = torch.randn(4, 8, dtype=torch.float64)
    lora = PeftModel.from_pretrained(Blocks().double(), tmp_path).eval()
    model = load_lora(Blocks().double(), tmp_path).eval()
    torch.testing.assert_close(model(x), lora(x), rtol=1e-12, atol=1e-12)
    model.save_pretrained(tmp_path / "wara")
    again = PeftModel.from_pretrained(Blocks().double(), tmp_path / "wara").eval()
    torch.testing.assert_close(again(x), lora(x), rtol=1e-12, atol=1e-12)


def test_an_order_that_peft_has_lost_is_named(tmp_path):
    lora = trained_lora(tmp_path, **LORAS[0])
    loaded = PeftModel.from_pretrained(Blocks(), tmp_path)
    scalings = [layers_of(model, LoraLayer)["base_model.model.layers.1.a"].scaling for model in (lora, loaded)]
    assert scalings == [{"default": 1 / 4}, {"default": 8.0}]
    said = "alpha_pattern of the LoRA .* has 'a' and 'layers.1.a', which both match 'layers.1.a'"
    with pytest.warns(UserWarning, match=said):
        load_lora(Blocks(), tmp_path)


def test_ranks_of_a_lora_whose_order_peft_has_lost_are_refused(tmp_path):
    trained_lora(tmp_path, rank_pattern={"layers.1.a": 2, "a": 6})
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(Blocks(), tmp_path)
    base = Blocks()
    with pytest.raises(
        ValueError, match=r"'layers\.1\.a\.lora_A\.weight' of shape \(2, 8\), but its config asks for \(6, 8\)"
    ):
        load_lora(base, tmp_path)
    assert not layers_of(base)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["(a|aa)+b?c", "(a+)+b", "(.*a){20}b", r"(\w+\s?)*b"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_match_for_ever_does_not_hang_loading(field, pattern, tmp_path):
    """PEFT matches by `re`, which does not end for any of these; `regex` knows how to for most."""
    base = nn.ModuleDict({"a" * 60: nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["a" * 60])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {field: {"a+": 4, pattern: 5}}))
    start = time.monotonic()
    if pattern == "(a|aa)+b?c":
        with pytest.raises(ValueError, match=rf"{field}\['\(a\|aa\)\+b\?c'\] takes more than 1.0 s"):
            PeftModel.from_pretrained(base, tmp_path)
    else:
        with pytest.warns(RuntimeWarning, match=f"The following {field} keys did not match"):
            layers = layers_of(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
        assert [layer.wara_alpha["default"] for layer in layers.values()] == [4 if field == "alpha_pattern" else 16]
    assert not layers_of(base)
    assert time.monotonic() - start < 60
