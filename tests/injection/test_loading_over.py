"""Loading a saved adapter over one that is in the model: the same adapter, or a refusal that leaves all as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from tests.references import Mlp
from wara_peft import WaRAConfig
from wara_peft.training.components import keep_components

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))


def model_of(seed: int = 1, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    base = Mlp()
    torch.manual_seed(seed)
    return get_peft_model(base, WaRAConfig(**{"target_modules": ["up"], "init_weights": False, **fields})).eval()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


BANDS = {"aa1": 2, "ad1": 4, "da1": 4, "dd1": 2}
SAME_SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "wavelet": ({"wavelet": "db2"}, {}, "wavelet='db2' there and 'haar' here"),
    "form": ({"form": "shared", "r": 16}, {"r": 4}, "form='shared' there and 'subband' here"),
    "levels": (
        {"levels": 2, "subband_ranks": {"aa2": 0, "ad2": 0, "da2": 0, "dd2": 0}},
        {"subband_ranks": {"aa1": 0}},
        "levels=2 there and 1 here",
    ),
    "order of ranks": (
        {"subband_ranks": BANDS},
        {"subband_ranks": {**BANDS, "aa1": 4, "ad1": 2}},
        r"ranks \{'aa1': 2, 'ad1': 4.* there and \{'aa1': 4, 'ad1': 2.* here in 'up'",
    ),
    "ranks by pattern": ({"rank_pattern": {"up": BANDS}}, {"r": 3}, "ranks .* there and .* here in 'up'"),
    "alpha": ({"wara_alpha": 32}, {}, "scaling 2 there and 1 here in 'up'"),
    "alpha by pattern": ({"alpha_pattern": {"up": 8}}, {}, "scaling 0.5 there and 1 here in 'up'"),
    "rslora": ({"wara_alpha": 16, "use_rslora": True}, {}, "scaling 4 there and 1 here in 'up'"),
    "prefix": (
        {"form": "grid", "num_prefix_tokens": 1},
        {"form": "grid", "num_prefix_tokens": 0},
        "num_prefix_tokens=1 there and 0 here",
    ),
    "grid": (
        {"form": "grid", "grid_size": (2, 8)},
        {"form": "grid", "grid_size": (4, 4)},
        r"grid_size=\(2, 8\) there and \(4, 4\) here",
    ),
    "pairs": ({"form": "grid", "grid_pairs": "shared", "r": 16}, {"form": "grid"}, "grid_pairs='shared' there"),
    "core": ({"form": "tiny", "r": 1, "core": "diagonal"}, {"form": "tiny", "r": 1}, "core='diagonal' there"),
    "basis": (
        {"form": "tiny", "r": 2, "save_basis": False},
        {"form": "tiny", "r": 2},
        "save_basis=False there and True here",
    ),
    "biases": ({"bias": "wara_only"}, {}, "bias='wara_only' there and 'none' here"),
    "trained modules": ({"modules_to_save": ["head"]}, {}, r"modules_to_save=\['head'\] there and None here"),
}


@pytest.mark.parametrize("case", SAME_SHAPES)
def test_what_would_mean_something_else_is_refused(case: str, tmp_path: Path) -> None:
    there, here, said = SAME_SHAPES[case]
    model_of(2, **there).save_pretrained(tmp_path)
    model = model_of(1, **here)
    before = values(model)
    with pytest.raises(ValueError, match=said) as raised:
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert "WaRAConfig.from_pretrained" in str(raised.value) and "another name" in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    model.load_adapter(tmp_path, "other")  # as the message says


@pytest.mark.parametrize("here", [[2], None], ids=["others", "none"])
def test_rows_of_other_tokens_are_refused(here: list[int] | None, tmp_path: Path) -> None:
    def adapted(tokens: list[int] | None) -> PeftModel:
        base = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 12), "up": nn.Linear(12, 8)})
        rows = None if tokens is None else {"embed_tokens": tokens}
        return get_peft_model(base, WaRAConfig(target_modules=["up"], trainable_token_indices=rows))

    adapted([1]).save_pretrained(tmp_path)
    model = adapted(here)
    before = values(model)
    with pytest.raises(ValueError, match=r"trainable_token_indices=\{'embed_tokens': \[1\]\} there and"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shapes_of_modules_count(tmp_path: Path) -> None:
    """Coefficients of 11 channels have the shapes of those of 12."""
    get_peft_model(Mlp(11), WaRAConfig(target_modules=["up"])).save_pretrained(tmp_path)
    model = model_of()
    before = values(model)
    with pytest.raises(ValueError, match=r"made for modules of other \(out, in\) shapes: 'up' \(saved \(20, 11\)"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_base_weights_count_where_they_make_the_basis(tmp_path: Path) -> None:
    fields = {"form": "tiny", "r": 2, "save_basis": False}
    model_of(**fields).save_pretrained(tmp_path)
    torch.manual_seed(7)
    other = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], **fields))
    with pytest.raises(ValueError, match="other base weights than those of module 'up'"):
        other.load_adapter(tmp_path, "default")


def test_another_method_is_refused(tmp_path: Path) -> None:
    """PEFT loads nothing of it then, and says nothing."""
    get_peft_model(Mlp(), LoraConfig(target_modules=["up"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"which is a WaRA adapter: it is of type .*LORA"):
        model_of().load_adapter(tmp_path, "default")


def test_a_config_of_ones_own_has_to_fit_the_file(tmp_path: Path) -> None:
    model_of(wavelet="db2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="wavelet='db2' there and 'haar' here"):
        PeftModel.from_pretrained(Mlp(), tmp_path, config=WaRAConfig(target_modules=["up"]))


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({}, {}),
        ({"wara_alpha": 16}, {}),  # alpha = R is the default
        ({"wavelet": "db1"}, {"wavelet": "haar"}),  # one wavelet of two names
        ({"r": 4}, {"r": 9, "subband_ranks": {"aa1": 4, "ad1": 4, "da1": 4, "dd1": 4}}),
        ({"rank_pattern": {"up": 2}, "alpha_pattern": {"^up": 3}}, {"r": 2, "wara_alpha": 3}),
        ({"wara_dropout": 0.2, "modules_to_save": None}, {}),
        ({"form": "tiny", "r": 2}, {"form": "tiny", "r": 2}),
    ],
)
def test_what_means_the_same_is_loaded(there: dict[str, Any], here: dict[str, Any], tmp_path: Path) -> None:
    source = model_of(2, **there)
    source.save_pretrained(tmp_path)
    model = model_of(1, **here)
    assert not torch.allclose(model(X), source(X))
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(X), source(X), rtol=1e-6, atol=1e-6)


def test_an_adapter_that_was_cut_loads_its_own_file_and_not_that_of_before(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path / "before")
    keep_components(model, "default", {"up": {"aa1": [1], "dd1": [0, 2]}})
    model.save_pretrained(tmp_path / "cut")
    expected = model(X)
    with pytest.raises(ValueError, match=r"ranks .* there and \{'aa1': 1, 'dd1': 2\} here in 'up'"):
        model.load_adapter(tmp_path / "before", "default")
    model.load_adapter(tmp_path / "cut", "default")
    assert torch.equal(model(X), expected)


KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "levels": (
        {"levels": 2, "subband_ranks": {"dd1": 7}},
        {"subband_ranks": {"aa1": 4, "ad1": 4, "da1": 4, "dd1": 3}},
        "given wara_A.level1, wara_A.level2.* in the model wara_A.level1, wara_B.level1",
    ),
    "fewer levels": ({}, {"levels": 2, "subband_ranks": {"dd1": 8}}, "in the model wara_A.level1, wara_A.level2"),
    "form": ({"form": "tiny", "r": 2}, {"form": "subband"}, "given wara_basis.A_level1"),
    "gain": ({"form": "grid", "grid_pairs": "shared", "r": 16}, {"form": "grid"}, "given .*wara_gain"),
}


@pytest.mark.parametrize("injected", [False, True], ids=["PeftModel", "injected"])
@pytest.mark.parametrize("case", KEYS)
def test_tensors_of_other_keys_are_refused(case: str, injected: bool) -> None:
    """`set_peft_model_state_dict` gets tensors and no config, and leaves out what it does not find."""
    there, here, said = KEYS[case]
    tensors = get_peft_model_state_dict(model_of(2, **there))
    model = model_of(1, **here)
    target = model.base_model.model if injected else model
    before = values(model)
    with pytest.raises(ValueError, match=f"module 'up' .*{said}"):
        set_peft_model_state_dict(target, tensors)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_tensors_of_other_modules_are_no_matter_of_keys() -> None:
    tensors = get_peft_model_state_dict(model_of(2, target_modules=["up", "down"]))
    model = model_of(1)
    set_peft_model_state_dict(model, tensors)
    assert torch.equal(get_peft_model_state_dict(model)[KEY], tensors[KEY])


KEY = "base_model.model.up.wara_A.level1"


def test_lora_is_loaded_as_before(tmp_path: Path) -> None:
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["up"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    other = get_peft_model(Mlp(), LoraConfig(target_modules=["up"]))
    other.load_adapter(tmp_path, "default")
    assert torch.equal(
        other.base_model.model.up.get_delta_weight("default"), model.base_model.model.up.get_delta_weight("default")
    )
