"""Compressed models on disk: the same again, in the life of a model of transformers, and damage of all kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, BertModel, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from tests.compression.models import TwoLayers, batches, bert, llama
from wara_peft import WaRAConfig
from wara_peft.compression import (
    SVD,
    DictionaryLinear,
    LowRankLinear,
    calibrate,
    compress,
    factorize,
    load_compressed,
    save_compressed,
)
from wara_peft.compression.methods import METHODS
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.factorized.saved import put_in_place

QUIET = {"show_progress_bar": False}


def compressed(
    make, solver: str = "activation", budget: float = 0.6
) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    model, data = make(), batches(6, labelled=make is bert)
    compress(model, METHODS[solver](budget), calibrate(model, data, **QUIET), **QUIET)
    return model, data


def equal(one: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        return torch.equal(one(**batch).logits, other(**batch).logits)


class TwiceConfig(PreTrainedConfig):
    model_type = "twice"


class Twice(PreTrainedModel):
    """A layer and a block that are registered under two names each, as where a model repeats its blocks."""

    config_class = TwiceConfig
    _tied_weights_keys: ClassVar = {r"second\.": r"first\.", r"other\.": r"block\."}

    def __init__(self, config: TwiceConfig) -> None:
        super().__init__(config)
        self.first = self.second = nn.Linear(12, 12)
        self.block = self.other = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.block(self.second(self.first(x))))


class TestOneLayerOfTwoNames:
    def test_is_one_layer_again(self, tmp_path: Path) -> None:
        AutoConfig.register("twice", TwiceConfig, exist_ok=True)
        model = Twice(TwiceConfig(tie_word_embeddings=True)).eval()
        compress(model, SVD(0.6), **QUIET)
        assert isinstance(model.first, LowRankLinear) and model.second is model.first
        save_compressed(model, tmp_path / "a")
        loaded = load_compressed(tmp_path / "a", Twice)
        assert isinstance(loaded.first, LowRankLinear) and loaded.second is loaded.first
        assert isinstance(loaded.block[0], LowRankLinear) and loaded.other is loaded.block
        x = torch.randn(3, 12)
        assert torch.equal(loaded(x), model(x))
        # A step of training keeps the names together, too.
        for one in (loaded, model):
            optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
            one(x).square().sum().backward()
            optimizer.step()
        assert torch.equal(loaded(x), model(x))

    @pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
    def test_whichever_name_the_checkpoint_has(self, names: list[str]) -> None:
        model = nn.ModuleDict({"first": nn.Linear(6, 4)})
        model["second"] = model["first"]
        shapes = {"down.weight": (2, 6), "up.weight": (4, 2), "up.bias": (4,)}
        replaced = put_in_place(model, {f"{name}.{key}": shape for name in names for key, shape in shapes.items()})
        assert replaced == ["first", "second"]
        assert isinstance(model["first"], LowRankLinear) and model["second"] is model["first"]


class TestAgain:
    @pytest.mark.parametrize("make", [bert, llama])
    @pytest.mark.parametrize("solver", ["activation", "dictionary-oneshot"])
    def test_to_the_last_bit_from_several_shards(self, tmp_path: Path, make, solver: str) -> None:
        model, data = compressed(make, solver)
        save_compressed(model, tmp_path / "a", max_shard_size="5KB")
        assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
        loaded = load_compressed(tmp_path / "a")
        assert type(loaded) is type(model) and not loaded.training
        assert equal(loaded, model, data[0])
        assert loaded.compression_report == model.compression_report
        kind = DictionaryLinear if "dictionary" in solver else LowRankLinear
        assert sum(isinstance(module, kind) for module in loaded.modules()) > 4
        save_compressed(loaded, tmp_path / "b")
        assert load_compressed(tmp_path / "b").compression_report == model.compression_report

    def test_size_on_disk_is_what_the_report_says(self, tmp_path: Path) -> None:
        model, _ = compressed(llama)
        save_compressed(model, tmp_path / "a")
        names = {layer.name for layer in model.compression_report.layers}
        tensors = load_file(tmp_path / "a" / "model.safetensors")
        of_targets = sum(
            tensor.numel() for key, tensor in tensors.items() if any(key.startswith(f"{name}.") for name in names)
        )
        assert of_targets == model.compression_report.parameters_after

    def test_other_dtypes_and_without_a_report(self, tmp_path: Path) -> None:
        model = llama()
        factorize(model, 0.5, target_modules=["up_proj"])
        save_compressed(model, tmp_path / "a")
        loaded = load_compressed(tmp_path / "a", dtype=torch.bfloat16)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
        assert not hasattr(loaded, "compression_report")
        record = json.loads((tmp_path / "a" / "compression.json").read_text())
        assert record["layers"]["model.layers.0.mlp.up_proj"] == {"kind": "LowRankLinear", "rank": 5}

    def test_as_another_class(self, tmp_path: Path) -> None:
        model, data = compressed(bert)
        model.bert.save_pretrained(tmp_path / "a")
        loaded = load_compressed(tmp_path / "a")
        assert type(loaded) is BertModel
        inputs = {key: value for key, value in data[0].items() if key != "labels"}
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).pooler_output, model.bert(**inputs).pooler_output)
        assert type(load_compressed(tmp_path / "a", BertModel)) is BertModel

    def test_overwriting_is_asked_for(self, tmp_path: Path) -> None:
        model, _ = compressed(bert)
        save_compressed(model, tmp_path / "a")
        before = (tmp_path / "a" / "model.safetensors").read_bytes()
        with pytest.raises(ValueError, match="exists already"):
            save_compressed(model, tmp_path / "a")
        assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
        save_compressed(compressed(bert, budget=0.4)[0], tmp_path / "a", overwrite=True)
        assert (
            load_compressed(tmp_path / "a").compression_report.parameters_after
            < model.compression_report.parameters_after
        )
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


class TestLife:
    def test_generates_as_before(self, tmp_path: Path) -> None:
        model, _ = compressed(llama)
        save_compressed(model, tmp_path / "a")
        tokens = torch.tensor([[3, 4, 5]])
        options = {"max_new_tokens": 6, "do_sample": False}
        found = load_compressed(tmp_path / "a").generate(tokens, **options)
        assert found.shape[1] > 3 and torch.equal(found, model.generate(tokens, **options))

    @pytest.mark.slow
    def test_checkpoints_of_trainer_load(self, tmp_path: Path) -> None:
        model, data = compressed(bert)
        rows = [{key: value[0] for key, value in batch.items()} for batch in data]
        arguments = TrainingArguments(
            tmp_path / "run", max_steps=2, save_steps=2, per_device_train_batch_size=3, report_to=[], disable_tqdm=True
        )
        before = {key: value.clone() for key, value in model.state_dict().items()}
        Trainer(model, arguments, train_dataset=rows).train()
        moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
        assert any(key.endswith("down.weight") for key in moved) and any(key.endswith("up.weight") for key in moved)
        loaded = load_compressed(tmp_path / "run" / "checkpoint-2")
        assert equal(loaded, model.eval(), data[0])
        resumed = Trainer(loaded, arguments, train_dataset=rows)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

    @pytest.mark.parametrize("config_class", [LoraConfig, WaRAConfig])
    def test_an_adapter_on_the_factors_merges_on_disk(self, tmp_path: Path, config_class) -> None:
        model, data = compressed(bert)
        save_compressed(model, tmp_path / "base", max_shard_size="8KB")
        base = load_compressed(tmp_path / "base")
        names = [name for name, module in base.named_modules() if isinstance(module, LowRankLinear)]
        targets = [f"{name}.{part}" for name in names for part in ("down", "up")]
        adapted = get_peft_model(base, config_class(r=2, target_modules=targets))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "wara_B" in name:
                nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load_compressed(tmp_path / "base"), tmp_path / "adapter").eval()
        with torch.no_grad():
            expected = adapted.eval()(**data[0]).logits
            assert not torch.allclose(expected, model(**data[0]).logits, atol=1e-3)
            torch.testing.assert_close(again(**data[0]).logits, expected)
            if config_class is WaRAConfig:
                merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
                merged = load_compressed(tmp_path / "merged")
                assert merged.compression_report == model.compression_report
                torch.testing.assert_close(merged(**data[0]).logits, expected, rtol=0, atol=1e-5)
        save_compressed(again.merge_and_unload(), tmp_path / "again")
        with torch.no_grad():
            torch.testing.assert_close(
                load_compressed(tmp_path / "again")(**data[0]).logits, expected, rtol=0, atol=1e-5
            )


def edit(path: Path, change) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def config(path: Path, change) -> None:
    edit(path / "config.json", change)


def tensors(path: Path, change) -> None:
    found = load_file(path / "model.safetensors")
    change(found)
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    found = {}
    for solver in ("activation", "dictionary-oneshot"):
        found[solver] = tmp_path_factory.mktemp("saved") / "a"
        model, _ = compressed(llama, solver)
        names = [layer.name for layer in model.compression_report.layers if layer.rank is not None]
        assert UP in names
        save_compressed(model, found[solver])
    return found


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: (path / "config.json").unlink(), "There is no file .*config.json"),
            (
                lambda path: config(path, lambda f: f.update(num_hidden_layers=10**6)),
                "num_hidden_layers",
            ),
            (lambda path: config(path, lambda f: f.update(architectures=["os"])), "names no class"),
            (lambda path: config(path, lambda f: f.update(architectures=None)), "names no class"),
            (
                lambda path: config(path, lambda f: f.update(vocab_size=10**9)),
                r"shape \(40, 16\), where",
            ),
            (lambda path: config(path, lambda f: f.update(intermediate_size=64)), "needs"),
            (
                lambda path: config(path, lambda f: f.update(num_hidden_layers=3)),
                "lacks 'model.layers.2",
            ),
            (lambda path: config(path, lambda f: f.update(num_hidden_layers=1)), "contradicts"),
            (lambda path: (path / "compression.json").write_text("[]"), "is not a JSON object"),
            (lambda path: edit(path / "compression.json", lambda f: f.update(version=9)), "version=9"),
            (lambda path: edit(path / "compression.json", lambda f: f.update(report={"layers": 3})), "broken report"),
            (lambda path: edit(path / "compression.json", lambda f: f["layers"].pop(UP)), f"contradicts .*{UP}"),
            (lambda path: edit(path / "compression.json", lambda f: f["layers"][UP].update(rank=99)), "contradicts"),
            (lambda path: tensors(path, lambda t: t.pop(f"{UP}.up.weight")), "contradicts"),
            (
                lambda path: tensors(path, lambda t: t.update({f"{UP}.up.weight": torch.zeros(32, 99)})),
                r"up_proj.up.weight' of shape \(32, 99\)",
            ),
            (
                lambda path: tensors(path, lambda t: t.update({f"{UP}.weight": torch.zeros(32, 16)})),
                "or a dense weight beside them",
            ),
            (lambda path: tensors(path, lambda t: t[f"{UP}.up.weight"].fill_(torch.nan)), "not finite"),
            (lambda path: tensors(path, lambda t: t.update(spare=torch.zeros(1))), "does not ask for, 'spare'"),
            (lambda path: tensors(path, lambda t: t.pop("lm_head.weight")), "lacks 'lm_head.weight'"),
            (lambda path: (path / "adapter_config.json").write_text("{}"), "adapter"),
            (lambda path: (path / "model.safetensors").write_bytes(b"12345678"), "not a complete safetensors"),
            (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "is a pickle"),
        ],
    )
    def test_is_refused(self, saved: dict[str, Path], tmp_path: Path, damage, message: str) -> None:
        path = tmp_path / "a"
        path.mkdir()
        for file in saved["activation"].iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        load_compressed(path)
        damage(path)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_compressed(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t[f"{UP}.support"].fill_(255), "does not have . of . places"),
            (lambda t: t[f"{UP}.support"].zero_(), "does not have . of . places"),
            (lambda t: t.update({f"{UP}.support": torch.zeros(32, 9, dtype=torch.uint8)}), r"shape \(32, 9\)"),
            (lambda t: t.update({f"{UP}.values": torch.zeros(32, 9)}), "Cannot use|contradicts|must be an int from"),
        ],
    )
    def test_of_a_dictionary(self, saved: dict[str, Path], tmp_path: Path, change, message: str) -> None:
        path = tmp_path / "a"
        path.mkdir()
        for file in saved["dictionary-oneshot"].iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        tensors(path, change)
        with pytest.raises(ValueError, match=message):
            load_compressed(path)

    def test_what_is_not_compressed(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no factorised layer; compress it"):
            save_compressed(llama(), tmp_path / "a")
        llama().save_pretrained(tmp_path / "b")
        with pytest.raises(ValueError, match="neither compressed nor an adapter; load it with from_pretrained"):
            load_compressed(tmp_path / "b")
        with pytest.raises(TypeError, match="TwoLayers is no PreTrainedModel"):
            save_compressed(TwoLayers(), tmp_path / "c")
        model, _ = compressed(llama)
        adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="has adapters, in 'lm_head'"):
            save_compressed(adapted.base_model.model, tmp_path / "c")
        with pytest.raises(FileNotFoundError, match="no model directory"):
            load_compressed(tmp_path / "c")
