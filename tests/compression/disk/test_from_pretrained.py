"""Transformers loads a compressed model rightly by itself, and stops if this package is not imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.compression.disk.test_names import METHODS, equal
from tests.compression.models import batches, bert, llama, vit
from tests.forked_python import run_python
from wara_peft import WaRAConfig
from wara_peft.compression import (
    LowRankLinear,
    factorize,
    factorize_linear,
    load_compressed,
    save_compressed,
    to_dense,
)
from wara_peft.factorized.saved import FACTORIZED, name_tensors

WRITERS: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "save_compressed": save_compressed,
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "shards": lambda model, path: model.save_pretrained(path, max_shard_size="4KB"),
}


def factorized(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    model = make()
    factorize(model, 0.5)
    return model


def stays_usable(model: PreTrainedModel) -> bool:
    """Whether transformers would let the model be trained, converted and compiled as a dense one."""
    return not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("writer", WRITERS)
def test_from_pretrained_gives_the_model_again(method: str, writer: str, tmp_path: Path) -> None:
    model = vit()
    METHODS[method](model)
    model.eval()
    WRITERS[writer](model, tmp_path / "a")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "a")
    assert equal(loaded, model) and repr(loaded) == repr(model) and stays_usable(loaded)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
    loaded.save_pretrained(tmp_path / "b")  # as after healing
    assert equal(AutoModelForImageClassification.from_pretrained(tmp_path / "b"), model)
    assert equal(load_compressed(tmp_path / "b"), model)


@pytest.mark.parametrize(
    ("make", "loader"),
    [
        (llama, AutoModelForCausalLM.from_pretrained),
        (llama, LlamaForCausalLM.from_pretrained),
        (bert, AutoModelForSequenceClassification.from_pretrained),
        (bert, BertForSequenceClassification.from_pretrained),
    ],
)
def test_nothing_is_reported_and_dtypes_are_obeyed(make, loader, tmp_path: Path) -> None:
    model = factorized(make)
    model.save_pretrained(tmp_path)
    loaded, info = loader(tmp_path, output_loading_info=True)
    assert not any(info.values()) and equal(loaded, model)
    assert equal(loader(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16))
    assert loaded.half().dtype == torch.float16


def test_a_body_of_a_model_with_a_head(tmp_path: Path) -> None:
    model = factorized(bert)
    model.save_pretrained(tmp_path / "a")
    for body in (AutoModel.from_pretrained(tmp_path / "a"), BertModel.from_pretrained(tmp_path / "a")):
        assert equal(body, model.bert)
    model.bert.save_pretrained(tmp_path / "b")
    assert equal(AutoModel.from_pretrained(tmp_path / "b"), model.bert)


def test_a_factorised_head_on_a_dense_body(tmp_path: Path) -> None:
    """Both have one config."""
    model = bert()
    model.classifier = factorize_linear(model.classifier, 1)
    name_tensors(model)
    model.save_pretrained(tmp_path)
    assert equal(AutoModelForSequenceClassification.from_pretrained(tmp_path), model)
    assert equal(AutoModel.from_pretrained(tmp_path), model.bert)


def test_pipelines(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "wavelets", "are", "small", "waves"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path)
    model = factorized(bert)
    model.save_pretrained(tmp_path)
    text = "wavelets are small waves"
    (found,) = pipeline("text-classification", model=str(tmp_path), device="cpu")(text, top_k=None, batch_size=1)[:1]
    with torch.no_grad():
        expected = model(torch.tensor([[2, 3, 4, 5]])).logits.softmax(-1).max()
    assert found["score"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("config", [LoraConfig, WaRAConfig])
def test_peft_finds_the_base_by_itself_and_a_healed_model_is_written_as_one(config: type, tmp_path: Path) -> None:
    model = factorized(bert)
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, config(r=2, target_modules=r".*\.(down|up)", task_type="SEQ_CLS")).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "wara_B" in name:
            nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    batch = batches(1)[0]
    with torch.no_grad():
        expected = adapted.eval()(**batch).logits
        assert not torch.allclose(expected.float(), model(**batch).logits, atol=1e-3)
        again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval().double()
        torch.testing.assert_close(again(**batch).logits, expected)
        fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        torch.testing.assert_close(
            PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval().double()(**batch).logits, expected
        )
        healed = again.merge_and_unload()
        healed.save_pretrained(tmp_path / "healed")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "healed")
        assert equal(loaded, healed)
        torch.testing.assert_close(loaded(**batch).logits, expected)


def test_trainer_heals_a_loaded_model(tmp_path: Path) -> None:
    model = factorized(bert)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    rows = [{key: value[row] for key, value in batches(1)[0].items()} for row in range(4)]
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, save_steps=2, report_to=[], use_cpu=True)
    Trainer(loaded, arguments, train_dataset=rows).train()
    moved = [key for key, value in loaded.state_dict().items() if not torch.equal(value, model.state_dict()[key])]
    assert any(key.endswith("down.weight") for key in moved)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert equal(AutoModelForSequenceClassification.from_pretrained(checkpoint), loaded)
    # `Trainer` resumes by loading the files into the model.
    Trainer(loaded, arguments, train_dataset=rows).train(resume_from_checkpoint=str(checkpoint))


STOPS = """
import json, sys
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTModel
assert "wara_peft" not in sys.modules
said = {}
for path in sys.argv[1:]:
    for loader in (AutoModelForImageClassification, ViTForImageClassification, ViTModel):
        try:
            loader.from_pretrained(path)
            said[f"{path} {loader.__name__}"] = "loaded"
        except RuntimeError as error:
            said[f"{path} {loader.__name__}"] = str(error)
assert "wara_peft" not in sys.modules
print(json.dumps(said))
"""


@pytest.mark.slow
def test_transformers_without_this_package_stops(tmp_path: Path) -> None:
    paths = []
    for method, apply in METHODS.items():
        for writer, write in WRITERS.items():
            model = vit()
            apply(model)
            paths.append(tmp_path / f"{method}-{writer}")
            write(model, paths[-1])
    result = run_python("-c", STOPS, *paths)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert len(said) == 3 * len(paths)
    assert {text for text in said.values() if "ignore_mismatched_sizes" not in text} == set()
    assert "got wara_peft" in result.stderr  # the warning before names what to import
    dense = vit()
    factorize(dense, 0.5)
    to_dense(dense, tmp_path / "dense")
    result = run_python("-c", STOPS, tmp_path / "dense")
    assert set(json.loads(result.stdout.splitlines()[-1]).values()) == {"loaded"}, result.stderr


def test_marks_are_of_all_factorised_layers_and_go_with_them(tmp_path: Path) -> None:
    model = factorized(llama)
    names = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, FACTORIZED)}
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert {name for name, tensor in tensors.items() if tensor.shape == (0,)} == names != set()
    assert tensors.keys() - names == model.state_dict().keys()
    fresh = llama()
    factorize(fresh, 0.5, "random")
    fresh.load_state_dict(tensors)  # strict
    assert equal(fresh, model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        llama().load_state_dict(tensors, strict=False)
    to_dense(model)
    model.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == llama().state_dict().keys()


def test_a_layer_that_lost_its_factors_is_refused(tmp_path: Path) -> None:
    factorized(llama).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.up.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_model_of_the_same_config_stays_dense(tmp_path: Path) -> None:
    model = factorized(llama)
    dense = LlamaForCausalLM(model.config)
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert equal(loaded, dense) and not any(isinstance(module, LowRankLinear) for module in loaded.modules())
    assert not hasattr(loaded.config, "quantization_config")
    again = LlamaForCausalLM.from_pretrained(tmp_path, config=model.config)
    assert equal(again, dense)
    model.save_pretrained(tmp_path / "a")
    assert equal(LlamaForCausalLM.from_pretrained(tmp_path / "a", config=model.config), model)


def test_what_tells_no_shapes_is_refused(tmp_path: Path) -> None:
    model = factorized(llama)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"Only safetensors tell .*'pytorch_model.bin'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no files\. Pass the directory .*load_factorized"):
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_the_quantization_of_others_stays() -> None:
    model = llama()
    model.config.quantization_config = entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    factorize(model, 0.5)
    assert model.config.quantization_config is entry
    to_dense(model)
    assert model.config.quantization_config is entry
