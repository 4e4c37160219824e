"""Merging on disk, shard by shard, against PEFT's `merge_and_unload` of the loaded model."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ResNetModel,
)

from tests.cases import each_case, tied_llama
from tests.models import bert, gpt2, llama, resnet
from wara_peft import WaRAConfig
from wara_peft.disk.adapters.merge import merge_checkpoint

INDEX = "model.safetensors.index.json"


def dinov2() -> Dinov2Model:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **sizes))


def saved(path: Path, base: PreTrainedModel, shard="4KB", **fields) -> PeftModel:
    """Save a base in shards, and an adapter on it with random values; the model with the adapter."""
    torch.manual_seed(0)
    base.save_pretrained(path / "base", max_shard_size=shard)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), WaRAConfig(init_weights=False, **{"wara_alpha": 3, **fields}))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "wara_" not in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(path / "adapter")
    return model


def merged(path: Path, **options) -> dict[str, torch.Tensor]:
    merge_checkpoint(path / "base", path / "adapter", path / "out", **options)
    return {name: value for file in (path / "out").glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.filterwarnings(
    "ignore:Model with `tie_word_embeddings|Could not find a config file|Setting `save_embedding_layers`|bias='"
)
@each_case("merge", "merge on disk", where=lambda case: case.is_of_transformers)
def test_equals_merge_and_unload(case, tmp_path):
    base, model = case.base(), case.adapted()
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    model.save_pretrained(tmp_path / "adapter")
    found = merged(tmp_path)
    expected = model.merge_and_unload()

    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "base").iterdir()
    }
    loaded = type(base).from_pretrained(tmp_path / "out")
    states = loaded.state_dict(), expected.state_dict(), base.state_dict()
    changed = 0
    for name in states[1]:
        assert torch.equal(states[0][name], states[1][name]), name
        changed += not torch.equal(states[1][name], states[2][name])
    assert changed >= 2
    index, original = (json.loads((tmp_path / where / INDEX).read_text()) for where in ("out", "base"))
    assert index["weight_map"] == original["weight_map"]
    assert (
        index["metadata"]["total_size"] == original["metadata"]["total_size"] == sum(v.nbytes for v in found.values())
    )


IDS = torch.arange(1, 7).view(1, 6)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def masked_bert() -> BertForMaskedLM:
    return bert(BertForMaskedLM)


# What is tied is a fact of the model, and PEFT ties some adapters with it: model, config, what is tied and left out
TIED = {
    "embedding and head": (tied_llama, {"target_modules": ["lm_head"], "ensure_weight_tying": True}, None),
    "by a regex": (tied_llama, {"target_modules": ".*(embed_tokens|q_proj)", "ensure_weight_tying": True}, None),
    "by a regex that PEFT does not see": (
        tied_llama,
        {"target_modules": r"model\.embed_tokens|.*q_proj", "ensure_weight_tying": True},
        "'lm_head.weight'",
    ),
    "not wanted": (tied_llama, {"target_modules": ["embed_tokens"]}, "'lm_head.weight'.*ensure_weight_tying=True"),
    "a name that PEFT does not know": (
        masked_bert,
        {"target_modules": ["word_embeddings"], "ensure_weight_tying": True},
        r"'cls.predictions.decoder.weight'.*\(`tie_word_embeddings=False`\)\.$",
    ),
    "the same of GPT-2": (gpt2, {"target_modules": ["wte"], "ensure_weight_tying": True}, "'lm_head.weight'"),
    "trained in full": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        None,
    ),
    "trained in full, alone": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "'model.embed_tokens.weight'",
    ),
    "trained in full where PEFT ties nothing": (
        masked_bert,
        {"target_modules": ["query"], "modules_to_save": ["word_embeddings"], "ensure_weight_tying": True},
        "'cls.predictions.decoder.weight'",
    ),
    "tokens": (
        masked_bert,
        {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [3, 7]}},
        None,
    ),
    "tokens of both": (
        tied_llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
        None,
    ),
    "other tokens of both": (
        tied_llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 8]}},
        "which the adapter changes otherwise",
    ),
    "biases": (masked_bert, {"target_modules": ["query"], "bias": "all"}, None),
}


@pytest.mark.parametrize("case", TIED)
def test_where_weights_are_tied_it_is_the_unmerged_model_or_refused(case, tmp_path):
    make, fields, refused = TIED[case]
    base = make()
    model = saved(tmp_path, base, **fields)
    if refused:
        with pytest.raises(ValueError, match=f"its weight is tied to .*{refused}"):
            merged(tmp_path)
        assert not (tmp_path / "out").exists()
        return
    merged(tmp_path)
    loaded = type(base).from_pretrained(tmp_path / "out")
    assert (logits(model) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*of which its config says nothing")
@pytest.mark.parametrize("tokens", [None, [3, 7]])
@pytest.mark.parametrize(
    ("make", "target"), [(gpt2, "c_attn"), (masked_bert, "query"), (llama, "q_proj"), (tied_llama, "q_proj")]
)
def test_embeddings_that_were_resized_and_saved(make, target, tokens, tmp_path):
    base = make()
    base.resize_token_embeddings(45, mean_resizing=False)
    model = saved(tmp_path, base, target_modules=[target], trainable_token_indices=tokens)
    embedding = re.compile(r"(wte|word_embeddings|embed_tokens)\.")
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if embedding.search(name))[9].mul_(3.0)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merged(tmp_path)
    loaded = type(base).from_pretrained(tmp_path / "out")
    assert not torch.allclose(loaded.get_input_embeddings().weight[9], base.get_input_embeddings().weight[9])
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "out")
    make().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"shape \(4.*\(4.*Merge into the base model that it was trained on, resized"):
        merged(tmp_path)


def test_what_peft_would_not_load_is_left_out(tmp_path):
    saved(tmp_path, llama(), target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.x.weight": torch.ones(2)}, file)
    with (
        pytest.warns(UserWarning, match="holds 'x.weight', of which its config says nothing"),
        pytest.warns(UserWarning, match="LlamaForCausalLM has no 'x.weight', which is left out"),
    ):
        found = merged(tmp_path)
    assert found.keys() == llama().state_dict().keys()


def test_a_module_that_counts(tmp_path):
    """A batch norm counts its batches, in an integer."""
    base = resnet()
    model = saved(tmp_path, base, target_modules=["convolution"], modules_to_save=["normalization"])
    for name, buffer in model.named_buffers():
        if "modules_to_save" in name:
            buffer.add_(7)
    model.save_pretrained(tmp_path / "adapter")
    merged(tmp_path, dtype=torch.float64)
    loaded = ResNetModel.from_pretrained(tmp_path / "out").state_dict()
    expected = model.merge_and_unload().double().state_dict()
    counts = [name for name in expected if name.endswith("num_batches_tracked")]
    assert {int(loaded[name]) for name in counts} == {7}
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, msg=name)


def test_one_file_stays_one_file(tmp_path):
    saved(tmp_path, llama(), shard="1GB", target_modules=["q_proj"])
    merged(tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


class TestDtype:
    def test_bfloat16_base_is_rounded_once(self, tmp_path):
        model = saved(tmp_path, llama().bfloat16(), target_modules=["q_proj"])
        name = "model.layers.0.self_attn.q_proj"
        layer = model.base_model.model.get_submodule(name)
        expected = layer.get_base_layer().weight.double() + layer.get_delta_weight("default", torch.float64)
        found = merged(tmp_path)[f"{name}.weight"]
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected.bfloat16(), atol=0, rtol=2**-8)
        assert (found == expected.bfloat16()).float().mean() > 0.99

    def test_another_dtype(self, tmp_path):
        model = saved(tmp_path, llama(), target_modules=["q_proj"])
        merged(tmp_path, dtype=torch.bfloat16)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.dtype == torch.bfloat16
        expected = model.merge_and_unload().bfloat16().state_dict()
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, expected[name]), name

    def test_base_weights_that_it_cannot_hold(self, tmp_path):
        base = llama()
        base.model.norm.weight.data[3] = 1e6
        saved(tmp_path, base, target_modules=["q_proj"])
        with pytest.raises(ValueError, match=r"'model.norm.weight' gives values that are not finite in torch.float16"):
            merged(tmp_path, dtype=torch.float16)
        assert not (tmp_path / "out").exists()

    def test_what_it_cannot_hold(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"], wara_alpha=1e9)
        with pytest.raises(ValueError, match=r"q_proj.weight' gives values that are not finite in torch.float16"):
            merged(tmp_path, dtype=torch.float16)
        assert not (tmp_path / "out").exists()


class TestHeads:
    def test_a_head_that_the_base_lacks(self, tmp_path):
        base = bert(BertModel)
        saved(tmp_path / "x", bert(num_labels=5), target_modules=["query"], task_type="SEQ_CLS")
        base.save_pretrained(tmp_path / "x" / "base", max_shard_size="4KB")
        for shard in (tmp_path / "x" / "base").glob("model-*"):
            assert "classifier.weight" not in load_file(shard) or shard.unlink()
        merged(tmp_path / "x")
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "x" / "out")
        assert loaded.config.num_labels == 5
        assert loaded.config.architectures == ["BertForSequenceClassification"]
        with_base = BertForSequenceClassification.from_pretrained(tmp_path / "x" / "base", num_labels=5)
        expected = PeftModel.from_pretrained(with_base, tmp_path / "x" / "adapter").merge_and_unload().state_dict()
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, expected[name]), name

    def test_a_head_of_another_size(self, tmp_path):
        saved(tmp_path, bert(num_labels=5), target_modules=["query"], modules_to_save=["classifier"])
        shutil.rmtree(tmp_path / "base")
        bert(num_labels=3).save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match=r"'classifier.*shape \(3.*and \(5.*another head or vocabulary"):
            merged(tmp_path)
        assert not (tmp_path / "out").exists()


class TestRefusals:
    """What cannot be merged right is refused before anything is written."""

    def refused(self, path: Path, match: str, error=ValueError, **options) -> None:
        before = sorted(path.rglob("*"))
        with pytest.raises(error, match=match):
            merged(path, **options)
        assert sorted(path.rglob("*")) == before

    def test_a_weight_that_is_converted_on_loading(self, tmp_path):
        base = dinov2()
        if not any("gate_proj" in name for name, _ in base.named_modules()):
            pytest.skip("this release of transformers keeps DINOv2's MLP as its files do")
        saved(tmp_path, base, target_modules=["gate_proj"])
        self.refused(tmp_path, "0 tensors that Dinov2Model loads as this weight .* may be fused, converted")

    @pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
    def test_a_weight_that_is_tied(self, tmp_path, target):
        saved(tmp_path, llama(tie_word_embeddings=True), target_modules=[target, "q_proj"])
        self.refused(tmp_path, f"{target}.weight': its weight is tied to .*ensure_weight_tying=True")

    def test_modules_that_the_base_does_not_have(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        shutil.rmtree(tmp_path / "base")
        gpt2().save_pretrained(tmp_path / "base")
        self.refused(tmp_path, "does not fit .*GPT2LMHeadModel has no 'model.layers.0.self_attn.q_proj.weight'")

    def test_modules_of_other_shapes(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        llama(hidden_size=64).save_pretrained(tmp_path / "base", max_shard_size="4KB")
        self.refused(tmp_path, r"q_proj.weight' has the shape \(64, 64\) in .*, and \(16, 16\) in the adapter")

    def test_a_quantized_base(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        self.refused(tmp_path, "is quantized. If bitsandbytes quantized it, merge into its deq.*--dequantize")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_a_quantized_base_that_does_not_say_so(self, tmp_path, dtype):
        saved(tmp_path, llama(), shard="1GB", target_modules=["q_proj"], modules_to_save=["norm"])
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        for key in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
            save_file({**tensors, key: tensors[key].to(dtype)}, file)
            self.refused(tmp_path, f"{key}' is of dtype .*: it is quantized, or not a weight")
        key = "model.layers.0.mlp.up_proj.weight"  # which the adapter leaves alone
        save_file({**tensors, key: tensors[key].to(dtype)}, file)
        if dtype.is_floating_point:
            self.refused(tmp_path, "quantized, and cannot be made torch.bfloat16", dtype=torch.bfloat16)
        assert torch.equal(merged(tmp_path)[key], tensors[key].to(dtype))

    def test_tokens_outside_of_the_vocabulary(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"], trainable_token_indices=[3, 7])
        path = tmp_path / "adapter" / "adapter_config.json"
        for indices in ([3, 99], [3], [3, -1]):
            path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": indices}))
            self.refused(tmp_path, "trainable_token_indices of the adapter do not fit .*embed_tokens")

    @pytest.mark.parametrize("name", ["../model-00001-of-00002.safetensors", "/etc/passwd", "..", "x.bin", 3, ""])
    def test_an_index_that_names_files_elsewhere(self, tmp_path, name):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        index = json.loads((tmp_path / "base" / INDEX).read_text())
        index["weight_map"]["model.norm.weight"] = name
        (tmp_path / "base" / INDEX).write_text(json.dumps(index))
        self.refused(tmp_path, "a safetensors file beside it was expected")

    @pytest.mark.parametrize("placement", range(8))
    def test_a_key_in_two_shards(self, tmp_path, placement):
        """Equal copies too: the index says otherwise, and which one counts is a matter of order."""
        saved(tmp_path, llama(), target_modules=["q_proj"])
        index = json.loads((tmp_path / "base" / INDEX).read_text())
        files = sorted(set(index["weight_map"].values()))
        key, home = sorted(index["weight_map"].items())[3 * placement % len(index["weight_map"])]
        other = tmp_path / "base" / next(name for name in files[placement:] + files if name != home)
        tensor = load_file(tmp_path / "base" / home)[key]
        save_file({**load_file(other), key: tensor}, other, metadata={"format": "pt"})
        self.refused(tmp_path, f"'{key}' .also in .*two files must not have one key")
        index["weight_map"][key] = other.name
        (tmp_path / "base" / INDEX).write_text(json.dumps(index))
        if home in index["weight_map"].values():
            self.refused(tmp_path, f"'{key}' .also in .*two files must not have one key")
        else:  # the index has no more to do with the other file
            assert merged(tmp_path).keys() == llama().state_dict().keys()

    def test_an_index_that_names_the_wrong_file(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        index = json.loads((tmp_path / "base" / INDEX).read_text())
        index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
        (tmp_path / "base" / INDEX).write_text(json.dumps(index))
        self.refused(tmp_path, "says .* has 'model.norm.weight'; it has not")

    @pytest.mark.parametrize(
        ("fields", "lost", "said"),
        [
            (
                {"modules_to_save": ["classifier"]},
                "classifier.bias",
                "lacks 'classifier.bias', which its config promises",
            ),
            ({"task_type": "SEQ_CLS"}, "classifier.weight", "lacks 'classifier.weight', which its config promises"),
            ({"task_type": "SEQ_CLS"}, "classifier.", "lacks 'classifier', 'score', which `modules_to_save`"),
            (
                {"bias": "wara_only"},
                "layer.1.attention.self.query.base_layer.bias",
                "lacks the bias of 'bert.*layer.1",
            ),
            ({"bias": "wara_only"}, ".bias", "query', .*which trained with bias"),
            ({"bias": "all"}, "LayerNorm.bias", "LayerNorm.bias', .* and 2 more, which its config promises"),
            ({"trainable_token_indices": {"word_embeddings": [3]}}, "_delta", "lacks the rows of tokens"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*says that biases were trained")
    def test_an_adapter_that_lacks_what_its_config_promises(self, tmp_path, fields, lost, said):
        saved(tmp_path, bert(), target_modules=["query"], **fields)
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        kept = {key: value for key, value in tensors.items() if lost not in key}
        assert len(kept) < len(tensors)
        save_file(kept, file)
        self.refused(tmp_path, said)

    def test_an_index_that_names_what_is_not_there(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        index = json.loads((tmp_path / "base" / INDEX).read_text())
        file = index["weight_map"]["model.norm.weight"]
        index["weight_map"]["more"] = file
        (tmp_path / "base" / INDEX).write_text(json.dumps(index))
        self.refused(tmp_path, "says .* has 'more'; it has not")
        index["weight_map"]["more"] = "other.safetensors"
        (tmp_path / "base" / INDEX).write_text(json.dumps(index))
        self.refused(tmp_path, "lacks 'other.safetensors'", FileNotFoundError)
        (tmp_path / "base" / INDEX).write_text('{"weight_map": []}')
        self.refused(tmp_path, "has no weight_map")

    def test_a_shard_cut_short(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        shard = sorted((tmp_path / "base").glob("*.safetensors"))[2]
        shard.write_bytes(shard.read_bytes()[:-10])
        self.refused(tmp_path, "is not a complete safetensors file")

    def test_pickles(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        for shard in (tmp_path / "base").glob("model*"):
            shard.unlink()
        (tmp_path / "base" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
        self.refused(tmp_path, "'pytorch_model.bin' is a pickle, which may run any code", FileNotFoundError)

    def test_no_base(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        (tmp_path / "base" / "config.json").unlink()
        self.refused(tmp_path, "There is no file .*config.json", FileNotFoundError)
        shutil.rmtree(tmp_path / "base")
        self.refused(tmp_path, "There is no model directory", FileNotFoundError)

    def test_a_config_of_no_known_model(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        (tmp_path / "base" / "config.json").write_text('{"model_type": "unheard-of"}')
        self.refused(tmp_path, "Cannot use .*config.json")

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000, far more than there are tensors"),
            ({"num_hidden_layers": 10**30}, "num_hidden_layers=1000.*, far more than there are tensors"),
            ({"text_config": [{"num_layers": 10**12}]}, "num_layers=1000000000000, far more"),
            ({"num_hidden_layers": 30_000}, "num_hidden_layers=30000, far more"),
            ({"num_hidden_layers": 5_000}, "its model has more than .* modules, far more than there are tensors"),
            ({"hidden_size": "wide"}, "Cannot use .*config.json.*hidden_size"),
            ({"num_attention_heads": 0}, "Cannot use .*config.json"),
            ({"hidden_act": "unheard-of"}, "Cannot use .*config.json"),
            ({"hidden_size": 10**30}, "Cannot use .*config.json"),
            ({"architectures": 7}, "Cannot use .*config.json"),
            ({"model_type": ["llama"]}, "Cannot use .*config.json"),
            ({"torch_dtype": "int8", "dtype": "unheard-of"}, "Cannot use .*config.json"),
        ],
    )
    def test_a_config_that_is_broken(self, tmp_path, fields, said):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        path = tmp_path / "base" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        begun = time.process_time()
        self.refused(tmp_path, said)
        assert time.process_time() - begun < 20  # seconds, where 10**7 layers would take hours

    def test_an_out_that_is_there(self, tmp_path):
        saved(tmp_path, llama(), target_modules=["q_proj"])
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("mine")
        self.refused(tmp_path, "exists already")
        merged(tmp_path, overwrite=True)
        for name in ("base", "adapter"):
            with pytest.raises(ValueError, match="must not be replaced"):
                merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / name, overwrite=True)


def test_a_base_of_another_head_keeps_its_other_weights(tmp_path):
    """An adapter on the encoder alone, merged into a checkpoint that also has a language-modelling head."""
    base = bert(BertForMaskedLM)
    saved(tmp_path, base.bert, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    shutil.rmtree(tmp_path / "base")
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    merged(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "out").state_dict()
    changed = [name for name, value in base.state_dict().items() if not torch.equal(loaded[name], value)]
    assert changed == [f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(2)]


def test_files_of_the_tokenizer_are_copied(tmp_path):
    saved(tmp_path, llama(), target_modules=["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja", "LICENSE"):
        (tmp_path / "base" / name).write_text(name)
    for name in ("training_args.bin", "pytorch_model.bin.index.json", "adapter_config.json", "notes.md"):
        (tmp_path / "base" / name).write_text(name)
    merged(tmp_path)
    found = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("model")}
    assert found == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"
