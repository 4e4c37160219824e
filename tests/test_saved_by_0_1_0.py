"""Adapters and compressed models that 0.1.0 saved, in tests/saved_by_0_1_0, go on computing what they computed there.

Each folder has beside the saved files an `expected.safetensors`, with the inputs and the logits that 0.1.0 gave.
What this release cannot compute is refused, and what it drops is named.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel
from typer.testing import CliRunner

from wara_peft import WaRAConfig, save_as_lora
from wara_peft.compression import load_compressed
from wara_peft_cli.app import app

SAVED = Path(__file__).with_name("saved_by_0_1_0")
ADAPTERS = sorted(path.name for path in (SAVED / "adapters").iterdir())
COMPRESSED = sorted(path.name for path in (SAVED / "compressed").iterdir())
NESTED = SAVED / "adapters" / "ordered"
SPATIAL = SAVED / "compressed" / "spatial_conv"


def base_of(adapter: Path, inputs: dict[str, torch.Tensor]) -> PreTrainedModel:
    if "pixel_values" in inputs:
        return AutoModelForImageClassification.from_pretrained(SAVED / "bases" / "vit")
    has_experts = json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]
    return AutoModelForCausalLM.from_pretrained(SAVED / "bases" / ("mixtral" if has_experts else "llama"))


@torch.no_grad()
def check(model: nn.Module, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@contextmanager
def dropped(expected: int) -> Iterator[None]:
    """Scope in which so many warnings tell of fields that a saved config has and `WaRAConfig` has not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = [str(warning.message) for warning in caught]
    assert not [text for text in told if "Unexpected keyword" in text]  # PEFT's, for fields that nobody explains
    told = [text for text in told if text.startswith("The saved adapter sets")]
    assert len(told) == expected
    assert all("sets ordered_dropout, component_order, rank_penalty, with" in text for text in told)
    assert all("computes what it did" in text for text in told)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name: str):
    path = SAVED / "adapters" / name
    inputs = load_file(path / "expected.safetensors")
    expected = inputs.pop("logits")
    base = base_of(path, inputs)
    with torch.no_grad():
        assert not torch.allclose(base.eval()(**inputs).logits, expected, atol=1e-2)
    with dropped(int(path == NESTED)):
        model = PeftModel.from_pretrained(base, path)
    check(model, inputs, expected)


def test_nested_adapter_by_every_way_in(tmp_path: Path):
    inputs = load_file(NESTED / "expected.safetensors")
    expected = inputs.pop("logits")
    base = base_of(NESTED, inputs)
    with dropped(1):
        config = PeftConfig.from_pretrained(NESTED)
    assert config.form == "subband" and not hasattr(config, "ordered_dropout")
    with dropped(1):
        save_as_lora(tmp_path / "lora", NESTED)
    check(PeftModel.from_pretrained(base, tmp_path / "lora"), inputs, expected)

    model = get_peft_model(base_of(NESTED, inputs), WaRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with dropped(1):
        model.load_adapter(NESTED, "default")
    check(model, inputs, expected)
    model.save_pretrained(tmp_path / "again")
    with dropped(0):
        again = PeftModel.from_pretrained(base_of(NESTED, inputs), tmp_path / "again")
    check(again, inputs, expected)

    base = base_of(NESTED, inputs)
    with dropped(1):
        base.load_adapter(str(NESTED))
    check(base, inputs, expected)


@pytest.mark.parametrize("name", [name for name in COMPRESSED if name != SPATIAL.name])
def test_compressed_model(name: str):
    path = SAVED / "compressed" / name
    inputs = load_file(path / "expected.safetensors")
    expected = inputs.pop("logits")
    check(load_compressed(path), inputs, expected)


def test_spatial_convolutions_are_refused_with_what_to_do(tmp_path: Path):
    said = (
        "'resnet.encoder.stages.0.layers.0.layer.1.convolution' is a SpatialLowRankConv2d, which wara-peft 0.1.0 wrote"
    )
    without_record = tmp_path / "saved_by_trainer"
    shutil.copytree(SPATIAL, without_record)
    (without_record / "compression.json").unlink()
    for path in (SPATIAL, without_record):
        with pytest.raises(ValueError, match=r"with 0\.1\.0 load the model, make it dense by .*to_dense") as error:
            load_compressed(path)
        assert str(error.value).startswith(said)
    adapter = SAVED / "adapters" / "subband"
    for arguments in (["inspect", SPATIAL], ["merge", SPATIAL, adapter, tmp_path / "merged"]):
        result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "1000"})
        assert result.exit_code == 1 and f"wara-peft: {said}" in result.stderr
    assert not (tmp_path / "merged").exists()
