"""Adapters and compressed models that 0.1.0 saved, in tests/saved_by_0_1_0, go on computing what they computed there.

Each folder has beside the saved files an `expected.safetensors`, with the inputs and the logits that 0.1.0 gave.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from wara_peft.compression import load_compressed

SAVED = Path(__file__).with_name("saved_by_0_1_0")
ADAPTERS = sorted(path.name for path in (SAVED / "adapters").iterdir())
COMPRESSED = sorted(path.name for path in (SAVED / "compressed").iterdir())


def base_of(adapter: Path, inputs: dict[str, torch.Tensor]) -> PreTrainedModel:
    if "pixel_values" in inputs:
        return AutoModelForImageClassification.from_pretrained(SAVED / "bases" / "vit")
    has_experts = json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]
    return AutoModelForCausalLM.from_pretrained(SAVED / "bases" / ("mixtral" if has_experts else "llama"))


@torch.no_grad()
def check(model: nn.Module, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name: str):
    path = SAVED / "adapters" / name
    inputs = load_file(path / "expected.safetensors")
    expected = inputs.pop("logits")
    base = base_of(path, inputs)
    with torch.no_grad():
        assert not torch.allclose(base.eval()(**inputs).logits, expected, atol=1e-2)
    check(PeftModel.from_pretrained(base, path), inputs, expected)


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_model(name: str):
    path = SAVED / "compressed" / name
    inputs = load_file(path / "expected.safetensors")
    expected = inputs.pop("logits")
    check(load_compressed(path), inputs, expected)
