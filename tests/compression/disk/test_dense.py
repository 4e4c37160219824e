"""`to_dense` writes directories that transformers loads as any other, and says what they cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.compression.disk.test_names import METHODS, equal
from tests.compression.models import TwoLayers, batches, llama, vit
from wara_peft.compression import LowRankLinear, factorize, to_dense
from wara_peft.factorized.saved import FACTORIZED


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("method", METHODS)
def test_the_directory_is_that_of_a_dense_model(method: str, tmp_path: Path) -> None:
    model = vit()
    METHODS[method](model)
    model.eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = model(images).logits
    done = to_dense(model, tmp_path / "a")
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    loaded, info = type(model).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values()) and repr(loaded) == repr(vit()) and equal(loaded, model) and done
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, expected, rtol=1e-4, atol=1e-5)


def test_gpt2_gets_its_own_layers_back(tmp_path: Path) -> None:
    model = gpt2()
    factorize(model, 0.5)
    assert isinstance(model.transformer.h[0].mlp.c_fc, LowRankLinear)
    batch = batches(1, labelled=False)[0]
    with torch.no_grad():
        expected = model(**batch).logits
        to_dense(model, tmp_path / "a")
        assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
        loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert not any(info.values()) and equal(loaded, model)
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_it_says_what_it_costs(tmp_path: Path) -> None:
    dense, model = llama(), llama()
    factorize(model, 0.5)
    names = [name for name, layer in model.named_modules() if isinstance(layer, FACTORIZED)]
    small = sum(parameter.numel() for parameter in model.parameters()), bytes_of(model)
    full = sum(parameter.numel() for parameter in dense.parameters()), bytes_of(dense)
    done = to_dense(model, tmp_path / "a")
    assert done == names and small[0] < full[0]
    assert (done.parameters_before, done.bytes_before) == small
    assert (done.parameters_after, done.bytes_after) == full
    for part in (f"{small[1]:,}", f"{full[1]:,}", f"{full[1] / small[1]:.2f} times", f"{len(names)} layers"):
        assert part in str(done)


class AttentionConfig(PreTrainedConfig):
    model_type = "with_pytorchs_attention"


class WithAttention(PreTrainedModel):
    config_class = AttentionConfig

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.post_init()


def test_what_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    model = llama()
    factorize(model, 0.5)
    before = list(model.modules())
    with pytest.raises(ValueError, match="there"):
        to_dense(model, tmp_path / "there")
    assert list(model.modules()) == before
    plain = TwoLayers()
    factorize(plain, 0.5)
    before = list(plain.modules())
    with pytest.raises(TypeError, match=r"TwoLayers is no PreTrainedModel.*without path"):
        to_dense(plain, tmp_path / "a")
    assert list(plain.modules()) == before
    opened = WithAttention(AttentionConfig())
    factorize(opened, 0.5)
    before = list(opened.modules())
    with pytest.raises(ValueError, match=r"no dense layer of the name 'attention\.q_proj'"):
        to_dense(opened, tmp_path / "a")
    assert list(opened.modules()) == before and not (tmp_path / "a").exists()
    assert to_dense(opened) and to_dense(plain)
    to_dense(model, tmp_path / "there", overwrite=True)
    assert (tmp_path / "there" / "config.json").is_file()
