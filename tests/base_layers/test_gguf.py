"""A model that transformers has loaded from a GGUF file, which the tests write with the package `gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from wara_peft import WaRAConfig, reparametrize_lora
from wara_peft.compression import SVD, compress, load_compressed, save_compressed
from wara_peft.dequantized import unmark_dequantized

WIDTH, HIDDEN, VOCABULARY, HEADS = 32, 64, 40, 2
SHAPES = {
    "token_embd": (VOCABULARY, WIDTH),
    "output": (VOCABULARY, WIDTH),
    "output_norm": (WIDTH,),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.ffn_norm": (WIDTH,),
    **{f"blk.0.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
    "blk.0.ffn_gate": (HIDDEN, WIDTH),
    "blk.0.ffn_up": (HIDDEN, WIDTH),
    "blk.0.ffn_down": (WIDTH, HIDDEN),
}
TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer as GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    writer = GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).mul(0.2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)


def train(model: torch.nn.Module, folder: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    options = TrainingArguments(
        str(folder), max_steps=1, learning_rate=0.1, report_to="none", save_strategy="no", use_cpu=True
    )
    Trainer(model, options, train_dataset=rows).train()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_transformers_neither_saves_nor_trains_such_a_model(folder: Path, tmp_path: Path) -> None:
    """Why there is something to do here: PEFT's LoRA on the same model fails."""
    if not getattr(loaded(folder), "is_quantized", False):
        pytest.skip("this release of transformers calls no dequantized model quantized")
    model = get_peft_model(loaded(folder), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="quantized with"):
        train(model, tmp_path)
    with pytest.raises(ValueError, match="not serializable"):
        model.merge_and_unload().save_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("reparametrised", [False, True])
def test_such_a_model_trains_merges_and_is_saved(folder: Path, tmp_path: Path, reparametrised: bool) -> None:
    if reparametrised:
        model = get_peft_model(loaded(folder), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        reparametrize_lora(model)
    else:
        model = get_peft_model(loaded(folder), WaRAConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    base = logits(model)
    train(model, tmp_path)
    trained = logits(model)
    assert not torch.allclose(trained, base, atol=1e-3)

    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)


def test_an_unloaded_model_is_saved_as_it_was_loaded(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(loaded(folder), WaRAConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.unload().save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = loaded(folder).state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_a_compressed_model_is_saved(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    compress(model, SVD(0.6), show_progress_bar=False)
    save_compressed(model, tmp_path)
    torch.testing.assert_close(logits(load_compressed(tmp_path)), logits(model))


def test_weights_in_blocks_and_other_methods_keep_their_mark(folder: Path) -> None:
    model: PreTrainedModel = loaded(folder)
    if not getattr(model, "is_quantized", False):
        pytest.skip("this release of transformers calls no dequantized model quantized")
    model.hf_quantizer.packed_modules = {"model.layers.0.self_attn.q_proj.weight": object()}
    unmark_dequantized(model)
    assert model.is_quantized and model.config.quantization_config is not None
    model.hf_quantizer.packed_modules = {}
    model.hf_quantizer.quantization_config.quant_method = "bitsandbytes"
    unmark_dequantized(model)
    assert model.is_quantized and model.config.quantization_config is not None
