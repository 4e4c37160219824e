"""Each family of transformers' models with factorised layers: save, load in a fresh model, and compare to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from wara_peft.compression import factorize, load_compressed, save_compressed, to_dense

from .models import FAMILIES, Family
from .test_families import TOLERANCE, build, output

ELSEWHERE = {"sentence-transformers", "timm", "unet", "dit", "sd3", "flux"}
OURS = sorted(FAMILIES.keys() - ELSEWHERE)
RENAMED = ["vit", "deit", "beit", "dinov2", "swin", "segformer", "vit_mae", "ast", "llava", "gpt_neox"]
"""Families that transformers writes with other names than those of their modules, and fuses no tensor of."""


def factorised(family: Family) -> PreTrainedModel:
    model = build(family)
    assert isinstance(model, PreTrainedModel)
    assert factorize(model, 0.5).replaced
    return model


def loaded_from(path: Path, load: Callable[..., PreTrainedModel] = load_compressed) -> PreTrainedModel:
    model = load(path, dtype=torch.float64).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # the others know no float64 on CPUs
    return model


def assert_same(loaded: PreTrainedModel, state: dict[str, Tensor], expected: Tensor, family: Family) -> None:
    found = loaded.state_dict()
    assert found.keys() == state.keys()
    # DeBERTa makes two of its parameters in float32, whatever dtype is asked for.
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in found.items())
    scale = float(expected.abs().max())
    torch.testing.assert_close(output(loaded, family), expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_loads_to_the_bit_in_a_fresh_model(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = factorised(family)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = output(model, family)
    save_compressed(model, tmp_path / "a")
    loaded = loaded_from(tmp_path / "a")
    assert type(loaded) is type(model)
    assert_same(loaded, state, expected, family)
    loaded.save_pretrained(tmp_path / "b")  # as `Trainer` does
    assert_same(loaded_from(tmp_path / "b"), state, expected, family)
    assert_same(loaded_from(tmp_path / "b", type(model).from_pretrained), state, expected, family)


@pytest.mark.slow
@pytest.mark.parametrize("name", RENAMED)
def test_files_with_the_names_of_transformers_load(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = factorised(family)
    save_compressed(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del model._weight_conversions  # so that transformers undoes its own, as for dense models
    renamed = revert_weight_conversion(model, tensors)
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(loaded_from(tmp_path), model.state_dict(), output(model, family), family)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bert", "segformer"])
def test_a_model_made_dense_is_written_as_any_other(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    dense, model = build(family), factorised(family)
    to_dense(model)
    for path, one in ((tmp_path / "a", dense), (tmp_path / "b", model)):
        one.save_pretrained(path)
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    assert tensors.keys() == load_file(tmp_path / "a" / "model.safetensors").keys()
    again, info = type(model).from_pretrained(tmp_path / "b", output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
