"""Merging into dequantized weights on disk, against a model that transformers loads in 4 or 8 bits and dequantizes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from tests.disk.test_merge import dinov2
from tests.models import bert, llama
from wara_peft import WaRAConfig, save_as_lora
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.disk.checkpoints import dequantized
from wara_peft.disk.checkpoints.tensors import TensorFile
from wara_peft_cli.app import app

INDEX = "model.safetensors.index.json"
# name of the quantization: how transformers is asked for it
WAYS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
# which only a quantized checkpoint tells
STORED = {
    **WAYS,
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "stored as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def wide_llama(**fields) -> PreTrainedModel:
    return llama(**SIZES, **fields)


def wide_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    # One layer has a square weight, whose shape does not tell that it is transposed.
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=40, n_positions=16)).eval()


def wide_bert() -> PreTrainedModel:
    return bert(BertForSequenceClassification, **SIZES)


def gpt_oss() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)).eval()


# model: its auto class, the targets
MODELS = {
    "llama": (wide_llama, AutoModelForCausalLM, ["q_proj", "down_proj"]),
    "tied llama": (lambda: wide_llama(tie_word_embeddings=True), AutoModelForCausalLM, ["q_proj", "down_proj"]),
    "gpt2": (wide_gpt2, AutoModelForCausalLM, ["c_attn", "c_proj"]),
    "bert": (wide_bert, AutoModelForSequenceClassification, ["query", "dense"]),
}


def in_bits(model: str, path: Path, way: str, dtype: torch.dtype = torch.bfloat16, shard="20KB") -> PreTrainedModel:
    """Save a model in `path / "dense"`, load it quantized, and save that in `path / "base"`."""
    make, auto_class, _ = MODELS[model]
    make().to(dtype).save_pretrained(path / "dense", max_shard_size=shard)
    config = BitsAndBytesConfig(**STORED[way])
    quantized = auto_class.from_pretrained(path / "dense", quantization_config=config, device_map={"": "cpu"})
    quantized.save_pretrained(path / "base", max_shard_size=shard)
    return quantized


def adapter_on(model: PreTrainedModel, path: Path, targets: list[str], **fields) -> PeftModel:
    """Save an adapter with random values beside a model, and as PEFT's LoRA."""
    torch.manual_seed(1)
    # Without a task type PEFT does not train BERT's head, which transformers quantizes.
    config = WaRAConfig(target_modules=targets, init_weights=False, wara_alpha=8, **fields)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(path / "adapter")
    save_as_lora(path / "lora", adapted)
    return adapted


def expected_weights(model: str, path: Path, way: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of the model that transformers dequantizes, and with PEFT's LoRA merged in float64, by their names."""
    auto_class = MODELS[model][1]
    config = BitsAndBytesConfig(**STORED[way])
    quantized = auto_class.from_pretrained(path / "dense", quantization_config=config, device_map={"": "cpu"})
    before = quantized.dequantize(dtype=torch.float32)  # 8-bit weights are scaled in float32
    plain = {name: value.clone() for name, value in before.state_dict().items()}
    merged = PeftModel.from_pretrained(before.double(), path / "lora", torch_dtype=torch.float64)
    return plain, merged.merge_and_unload().state_dict()


def check_written(path: Path, model: str, way: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Check `path / "out"`: adapted weights are rounded once, and the others are transformers' to the bit."""
    plain, merged = expected_weights(model, path, way)
    loaded = MODELS[model][1].from_pretrained(path / "out")
    assert not hasattr(loaded.config, "quantization_config")
    turned = {f"{name}.weight" for name, module in loaded.named_modules() if isinstance(module, Conv1D)}
    adapted = 0
    for name, value in loaded.state_dict().items():
        assert value.dtype == dtype, name
        unchanged, want = (part[name].T if name in turned else part[name] for part in (plain, merged))
        if torch.equal(unchanged.double(), want.double()):
            assert torch.equal(value, unchanged.to(dtype)), name
        else:
            adapted += 1
            # The sum is computed in float32.
            once = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(value.double(), want, rtol=once, atol=1e-7)
    assert adapted >= 2


@pytest.mark.parametrize("way", STORED)
def test_a_quantized_checkpoint(way, tmp_path):
    quantized = in_bits("llama", tmp_path, way)
    adapter_on(quantized, tmp_path, MODELS["llama"][2])
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dequantize=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    check_written(tmp_path, "llama", way)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_a_dense_checkpoint_with_the_quantization(model, way, tmp_path):
    adapter_on(in_bits(model, tmp_path, way), tmp_path, MODELS[model][2])
    options = {"dequantize": True, "quantization": way}
    merge_checkpoint(tmp_path / "dense", tmp_path / "adapter", tmp_path / "out", **options)
    check_written(tmp_path, model, way)
    # The stored weights are the same, so this is too.
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "stored", dequantize=True)
    found = [MODELS[model][1].from_pretrained(tmp_path / name).state_dict() for name in ("out", "stored")]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_dtype_that_the_base_has_when_it_is_quantized(dtype, tmp_path):
    """Rounding in bfloat16 would give other blocks of 4 bits."""
    adapter_on(in_bits("llama", tmp_path, "nf4", dtype), tmp_path, ["q_proj", "down_proj"])
    options = {"dequantize": True, "quantization": "nf4"}
    merge_checkpoint(tmp_path / "dense", tmp_path / "adapter", tmp_path / "out", **options)
    check_written(tmp_path, "llama", "nf4", dtype)


def test_a_config_without_a_dtype(tmp_path):
    adapter_on(in_bits("llama", tmp_path, "int8"), tmp_path, ["q_proj", "down_proj"])
    for name in ("base", "dense"):
        path = tmp_path / name / "config.json"
        fields = json.loads(path.read_text())
        del fields["dtype"]
        path.write_text(json.dumps(fields))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dequantize=True)
    check_written(tmp_path, "llama", "int8")


def test_another_dtype_to_write(tmp_path):
    adapter_on(in_bits("llama", tmp_path, "nf4"), tmp_path, ["q_proj", "down_proj"])
    options = {"dequantize": True, "dtype": torch.float32}
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    check_written(tmp_path, "llama", "nf4", torch.float32)


def test_what_the_quantized_model_computes(tmp_path):
    """Merged, it gives the logits of the 4-bit model with its adapter; merged into the dense base it does not."""
    model = adapter_on(in_bits("llama", tmp_path, "nf4", torch.float32), tmp_path, ["q_proj", "down_proj"]).eval()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dequantize=True)
    merge_checkpoint(tmp_path / "dense", tmp_path / "adapter", tmp_path / "into dense")
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        found, other = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("out", "into dense")
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (other - expected).norm() > 1000 * (found - expected).norm()


def test_a_head_that_was_left_out_and_trained(tmp_path):
    wide_bert().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"])
    base = BertForSequenceClassification.from_pretrained(tmp_path / "dense", quantization_config=config)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, WaRAConfig(target_modules=["query"], task_type="SEQ_CLS", init_weights=False))
    head = model.base_model.model.classifier.modules_to_save["default"]
    nn.init.normal_(head.weight)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dequantize=True)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.classifier.weight, head.weight.to(torch.bfloat16))


def test_dense_weights_of_a_large_file_are_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(dequantized, "SHARD_BYTES", 40_000)
    adapter_on(in_bits("llama", tmp_path, "nf4", shard="1GB"), tmp_path, ["q_proj", "down_proj"])
    assert [path.name for path in (tmp_path / "base").glob("*.safetensors")] == ["model.safetensors"]
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dequantize=True)
    sizes = [
        sum(tensor.nbytes for tensor in load_file(path).values()) for path in (tmp_path / "out").glob("*.safetensors")
    ]
    assert len(sizes) > 3 and max(sizes) <= 40_000
    check_written(tmp_path, "llama", "nf4")


def test_experts_that_bitsandbytes_keeps_in_three_dimensions(tmp_path):
    """transformers quantizes no such parameter, and bitsandbytes' own function does."""
    quantized, dense = gpt_oss(), gpt_oss()
    for layer, same in zip(quantized.model.layers, dense.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
            value = getattr(layer.mlp.experts, name).detach()
            assert value.dim() == 3 and not torch.equal(value, getattr(same.mlp.experts, name))
            getattr(same.mlp.experts, name).data.copy_(value)
    dense.save_pretrained(tmp_path / "base")
    save_file(quantized.state_dict(), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(dense, WaRAConfig(target_modules=[], target_parameters=targets, init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dequantize=True)
    found = GptOssForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made")
    adapter_on(in_bits("llama", path, "nf4-double", shard="1GB"), path, ["q_proj", "down_proj"])
    return path


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


@contextmanager
def keys_read() -> Iterator[list[str]]:
    """The keys of all tensors that are read from files in the block."""
    read, found = TensorFile.read, []

    def reading(file: TensorFile, keys: Iterable[str]) -> list[torch.Tensor]:
        found.extend(keys := list(keys))
        return read(file, keys)

    with patch.object(TensorFile, "read", reading):
        yield found


class TestRefusals:
    """Merging refuses, before it writes anything, a base or an adapter that it cannot merge right."""

    def refused(self, path: Path, match: str, base="base", error=ValueError, **options) -> None:
        before = sorted(path.rglob("*"))
        with pytest.raises(error, match=match), keys_read() as keys:
            merge_checkpoint(path / base, path / "adapter", path / "out", **{"dequantize": True, **options})
        assert sorted(path.rglob("*")) == before
        assert all(".quant_state." in key for key in keys)  # the description of a quantized weight, a few bytes

    def rewritten(self, path: Path, change) -> None:
        file = path / "base" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    def test_which_base_and_which_options(self, made):
        self.refused(made, "holds no weight that bitsandbytes quantized.*--quantization nf4", "dense")
        self.refused(made, "is quantized already.*Leave it out", quantization="nf4")
        self.refused(made, "quantization='nf8' is not one of 'nf4', 'nf4-double', 'int8'", "dense", quantization="nf8")
        self.refused(made, "needs dequantize=True .*--dequantize", "dense", quantization="nf4", dequantize=False)
        self.refused(made, "is quantized. If bitsandbytes quantized it, merge into its deq", dequantize=False)

    def test_an_output_that_exists_and_an_adapter_of_another_base(self, copied):
        (copied / "out").mkdir()
        (copied / "out" / "mine").write_text("mine")
        self.refused(copied, "'.*out' exists already")
        self.refused(copied, "'.*out' exists already", "dense", quantization="nf4")
        llama(hidden_size=64, intermediate_size=192).save_pretrained(copied / "other")
        self.refused(copied, r"has the shape \(64, 192\) in '.*other', and \(64, 128\)", "other", quantization="nf4")

    @pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "hqq", None, 7])
    def test_other_methods(self, copied, method):
        path = copied / "dense" / "config.json"
        fields = {**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}
        path.write_text(json.dumps(fields))
        for quantization in (None, "nf4"):
            said = f"is quantized by {method!r}, and only weights of 'bitsandbytes' .*16-bit model"
            self.refused(copied, said, "dense", quantization=quantization)

    def test_a_config_that_says_nothing(self, copied):
        """The tensors tell, and an older transformers named no method."""
        path = copied / "base" / "config.json"
        fields = json.loads(path.read_text())
        del fields["quantization_config"]
        path.write_text(json.dumps(fields))
        self.refused(copied, "is quantized already", quantization="nf4")
        path.write_text(json.dumps({**fields, "quantization_config": {"load_in_4bit": True}}))
        merge_checkpoint(copied / "base", copied / "adapter", copied / "out", dequantize=True)
        check_written(copied, "llama", "nf4-double")

    def test_no_bitsandbytes(self, made, monkeypatch):
        for name in ("bitsandbytes", "bitsandbytes.functional"):
            monkeypatch.setitem(sys.modules, name, None)
        said = r"bitsandbytes, .* is missing: pip install 'wara-peft\[quant\]'"
        self.refused(made, said, error=ImportError)
        self.refused(made, said, "dense", error=ImportError, quantization="nf4")

    @pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
    def test_descriptions_that_do_not_fit(self, copied, part):
        """bitsandbytes would read beyond such tensors."""
        key = "model.layers.0.mlp.up_proj.weight"
        name = f"{key}.{part}"
        self.rewritten(copied, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
        self.refused(copied, f"Cannot dequantize '{key}' .*{part}")
        self.rewritten(copied, lambda tensors: tensors.pop(name))
        self.refused(copied, f"Cannot dequantize '{key}'")

    @pytest.mark.parametrize("text", ["[]", "{", '{"shape": [-1, 64]}', '{"shape": [1e9, 64], "dtype": "int8"}'])
    def test_a_description_that_is_damaged(self, copied, text):
        key = "model.layers.0.mlp.up_proj.weight"
        state = torch.tensor(list(text.encode()), dtype=torch.uint8)
        self.rewritten(copied, lambda tensors: tensors.update({f"{key}.quant_state.bitsandbytes__nf4": state}))
        self.refused(copied, f"Cannot dequantize '{key}'")

    def test_a_weight_that_is_missing_or_cut(self, copied):
        key = "model.layers.0.mlp.up_proj.weight"
        self.rewritten(copied, lambda tensors: tensors.update({key: tensors[key][1:].clone()}))
        self.refused(copied, f"Cannot dequantize '{key}'")
        self.rewritten(copied, lambda tensors: tensors.pop(key))
        self.refused(copied, f"Cannot dequantize '{key}'")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_eight_bits_without_a_description(self, copied, dtype):
        weight = torch.zeros(64, 64).to(dtype)
        self.rewritten(copied, lambda tensors: tensors.update({"model.layers.0.more.weight": weight}))
        self.refused(copied, r"Cannot dequantize 'model.layers.0.more.weight' \(.*8.*\)")

    def test_scales_of_another_layer(self, tmp_path):
        adapter_on(in_bits("llama", tmp_path, "int8", shard="1GB"), tmp_path, ["q_proj"])
        key = "model.layers.0.mlp.up_proj.SCB"
        self.rewritten(tmp_path, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
        self.refused(tmp_path, "Cannot dequantize 'model.layers.0.mlp.up_proj.weight'")

    def test_weights_that_are_converted_on_loading(self, tmp_path):
        if not any("gate_proj" in name for name, _ in dinov2().named_modules()):
            pytest.skip("this release of transformers keeps DINOv2's MLP as its files do")
        dinov2().save_pretrained(tmp_path / "dense")
        adapter_on(dinov2(), tmp_path, ["q_proj"])
        self.refused(tmp_path, "Cannot round '.*_proj.weight': transformers fuses", "dense", quantization="nf4")


@pytest.mark.parametrize(
    ("base", "options", "failure"),
    [
        ("base", ["--dequantize"], None),
        ("dense", ["--dequantize", "--quantization", "nf4-double"], None),
        ("dense", ["--dequantize"], "holds no weight that bitsandbytes quantized"),
        ("base", ["--dequantize", "--quantization", "nf4"], "is quantized already"),
        ("dense", ["--quantization", "nf4"], "needs dequantize=True"),
    ],
)
def test_the_command_line(base, options, failure, copied):
    paths = [str(copied / name) for name in (base, "adapter", "out")]
    result = CliRunner().invoke(app, ["merge", *paths, *options])
    assert (result.exit_code != 0) == (failure is not None), result.output
    if failure is None:
        check_written(copied, "llama", "nf4-double")
    else:
        assert failure in result.output and not (copied / "out").exists()
