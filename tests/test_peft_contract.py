"""PEFT's promises for every method, by public names: whose object a config is, and what a deletion leaves."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests import models
from tests.references import Chain, Mlp, module_shapes, saved_config
from wara_peft import WaRAConfig
from wara_peft.layers.lookup import layers_of
from wara_peft.training.components import keep_components

TOKENS = torch.arange(1, 13).view(2, 6)


def llama(layers: int = 1, tied: bool = False) -> nn.Module:
    return models.llama(num_hidden_layers=layers, tie_word_embeddings=tied)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=40,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    return MixtralForCausalLM(config).eval()


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


class TestWhoseObjectTheConfigIs:
    def test_get_peft_model_add_adapter_and_loading_use_the_object(self, tmp_path: Path) -> None:
        first, second = WaRAConfig(target_modules=["up"]), WaRAConfig(target_modules=["down"])
        model = get_peft_model(Mlp(), first)
        model.add_adapter("other", second)
        assert model.peft_config["default"] is first and model.peft_config["other"] is second
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        given = WaRAConfig.from_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Mlp(), tmp_path, config=given)
        assert loaded.peft_config["default"] is given and given.inference_mode

    def test_transformers_and_injecting_use_the_object(self) -> None:
        config = WaRAConfig(target_modules=["q_proj"])
        model = llama()
        model.add_adapter(config)
        assert model.peft_config["default"] is config
        model = Mlp()
        config = WaRAConfig(target_modules=["up"])
        inject_adapter_in_model(config, model, "other")
        assert model.peft_config["other"] is config

    @pytest.mark.parametrize("targets", ["all-linear", None, ["q_proj"], r".*_proj"])
    def test_targets_are_resolved_in_it_as_in_loras(self, targets: Any) -> None:
        ours, loras = WaRAConfig(target_modules=targets), LoraConfig(target_modules=targets)
        get_peft_model(llama(), ours)
        get_peft_model(llama(), loras)
        assert ours.target_modules == loras.target_modules

    def test_nothing_that_the_model_finds_out_is_written_on_it(self) -> None:
        config = WaRAConfig(target_modules=["up"], form="tiny", save_basis=False, r=2)
        before = copy.deepcopy(config)
        model = get_peft_model(Mlp(), config)
        assert config == dataclasses.replace(before, base_model_name_or_path=config.base_model_name_or_path)
        saved = saved_config(model)
        assert saved["module_shapes"] == {"up": ["Linear", 20, 12]} and set(saved["base_weight_hashes"]) == {"up"}

    @pytest.mark.parametrize("config_class", [WaRAConfig, LoraConfig])
    def test_what_its_user_changes_later_is_not_lost(self, config_class: Any, tmp_path: Path) -> None:
        """An object that serves as a template says what its user writes into it."""
        config = config_class(target_modules="all-linear")
        get_peft_model(Mlp(), config)
        config.target_modules = ["up"]
        config.save_pretrained(tmp_path)
        assert config_class.from_pretrained(tmp_path).target_modules == {"up"}
        assert adapted_names(get_peft_model(Mlp(), config).base_model.model) == {"up"}

    def test_a_refused_model_leaves_it_as_it_was(self) -> None:
        class Refused(Mlp):
            def __init__(self) -> None:
                super().__init__()
                self.more = nn.Bilinear(2, 2, 2)

        config = WaRAConfig(target_modules=r".*", rank_pattern={"up": 2})
        before = copy.deepcopy(config)
        with pytest.raises(TypeError, match="Bilinear"):
            get_peft_model(Refused(), config)
        assert config == dataclasses.replace(before, base_model_name_or_path=config.base_model_name_or_path)
        config = WaRAConfig(target_modules="all-linear", r=30, form="tiny")
        with pytest.raises(ValueError, match="there are fewer"):
            get_peft_model(Mlp(), config)
        assert config.target_modules == "all-linear"
        model = llama()
        config = WaRAConfig(target_modules=None, r=30, form="tiny")
        with pytest.raises(ValueError, match="there are fewer"):
            model.add_adapter(config)
        assert config.target_modules is None


class TestOneObjectForSeveralModels:
    @staticmethod
    def check(config: WaRAConfig, make: tuple[Callable[[], nn.Module], ...], inputs: Any, tmp_path: Path) -> None:
        """Each of the models is adapted, saves and loads as one with a config of its own, in whatever order."""
        separate = copy.deepcopy(config)
        models, alone = [], []
        for build in make:
            torch.manual_seed(1)
            models.append(get_peft_model(build(), config).eval())
            torch.manual_seed(1)
            alone.append(get_peft_model(build(), copy.deepcopy(separate)).eval())
            assert adapted_names(models[-1]) == adapted_names(alone[-1])
        for place in (0, 1, 0):
            model, other, directory = models[place], alone[place], tmp_path / f"{place}"
            model.save_pretrained(directory / "shared")
            other.save_pretrained(directory / "alone")
            shared, own = (
                json.loads((directory / name / "adapter_config.json").read_text()) for name in ("shared", "alone")
            )
            for fields in (shared, own):
                targets = fields["target_modules"]
                fields["target_modules"] = sorted(targets) if isinstance(targets, list) else targets
            assert shared == own
            loaded = PeftModel.from_pretrained(make[place](), directory / "shared").eval()
            with torch.no_grad():
                found, expected = loaded(inputs[place]), other(inputs[place])
            torch.testing.assert_close(
                getattr(found, "logits", found), getattr(expected, "logits", expected), rtol=1e-6, atol=1e-6
            )

    @pytest.mark.parametrize("form", ["subband", "shared", "tiny"])
    def test_of_other_shapes(self, form: Any, tmp_path: Path) -> None:
        def build(width: int) -> nn.Module:
            torch.manual_seed(0)
            return Mlp(width)

        config = WaRAConfig(target_modules=["up"], form=form, r=2, init_weights=False)
        inputs = torch.randn(3, 12), torch.randn(3, 11)
        self.check(config, (lambda: build(12), lambda: build(11)), inputs, tmp_path)

    def test_of_other_depth(self, tmp_path: Path) -> None:
        """LoRA's config names the first model's layers from then on, and adapts half of the second one's."""

        def build(depth: int) -> nn.Module:
            torch.manual_seed(0)
            return Chain(8, depth)

        inputs = torch.randn(3, 8), torch.randn(3, 8)
        config = WaRAConfig(target_modules="all-linear", r=2, init_weights=False)
        self.check(config, (lambda: build(2), lambda: build(4)), inputs, tmp_path)

    @pytest.mark.parametrize("first_is_mixture", [True, False])
    def test_of_a_mixture_and_a_dense_model(self, first_is_mixture: bool, tmp_path: Path) -> None:
        make = (mixtral, llama) if first_is_mixture else (llama, mixtral)
        config = WaRAConfig(target_modules="all-linear", r=2, init_weights=False, rank_pattern={"q_proj": 1})
        self.check(config, make, (TOKENS, TOKENS), tmp_path)

    @pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied")
    @pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
    def test_of_a_tied_and_an_untied_model(self, field: str, tmp_path: Path) -> None:
        fields = {"target_modules": ["q_proj"], "modules_to_save": None}
        fields[field] = [*(fields[field] or ()), "lm_head"]
        config = WaRAConfig(**fields, r=2, init_weights=False, ensure_weight_tying=True)
        torch.manual_seed(2)
        get_peft_model(llama(tied=True), config)
        model = get_peft_model(llama(), config)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any("lm_head" in name for name in trained) and not any("embed_tokens" in name for name in trained)

    def test_in_one_model(self, tmp_path: Path) -> None:
        config = WaRAConfig(target_modules="all-linear", init_weights=False)
        model = get_peft_model(Mlp(), config)
        model.add_adapter("other", config)
        model.save_pretrained(tmp_path)
        for directory in (tmp_path, tmp_path / "other"):
            fields = json.loads((directory / "adapter_config.json").read_text())
            assert set(fields["module_shapes"]) == {"up", "down", "head"}

    @pytest.mark.parametrize(
        "copied",
        [copy.copy, copy.deepcopy, dataclasses.replace],
        ids=["copy", "deep", "replace"],
    )
    def test_copies_of_a_used_one(self, copied: Any) -> None:
        config = WaRAConfig(target_modules=["up"])
        get_peft_model(Mlp(12), config)
        assert module_shapes(get_peft_model(Mlp(8), copied(config))) == {"up": ["Linear", 20, 8]}

    def test_a_loaded_one(self, tmp_path: Path) -> None:
        get_peft_model(Mlp(12), WaRAConfig(target_modules=["up"])).save_pretrained(tmp_path)
        config = WaRAConfig.from_pretrained(tmp_path)
        config.inference_mode = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            narrow, wide = get_peft_model(Mlp(8), config), get_peft_model(Mlp(14), config)
        assert module_shapes(narrow)["up"] == ["Linear", 20, 8] and module_shapes(wide)["up"] == ["Linear", 20, 14]

    def test_a_model_that_was_copied_or_pickled_saves_its_own(self, tmp_path: Path) -> None:
        model = get_peft_model(Mlp(12), WaRAConfig(target_modules=["up"]))
        torch.save(model, tmp_path / "model.pt")
        pickled = torch.load(tmp_path / "model.pt", weights_only=False)
        for other in (copy.deepcopy(model), pickled):
            assert module_shapes(other) == {"up": ["Linear", 20, 12]}


def attributes_by_adapter(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Public attributes of the model and its adapter layers that hold something under an adapter's name."""
    for owner in (model, *(module for module in model.modules() if isinstance(module, BaseTunerLayer))):
        for name in dir(owner):
            value = None if name.startswith("_") else getattr(owner, name, None)
            if callable(getattr(value, "keys", None)) and adapter_name in value:
                yield name, value


class TestWhatIsLeftOfAnAdapter:
    CASES = (
        {"target_modules": ["up"], "wara_dropout": 0.1},
        {"target_modules": ["up"], "form": "shared"},
        {"target_modules": ["up"], "form": "tiny", "r": 2},
        {"target_modules": ["up"], "form": "grid", "grid_pairs": "shared"},
        {"target_modules": ["up"], "modules_to_save": ["head"]},
    )

    @pytest.mark.parametrize("fields", CASES)
    def test_nothing_is_left_of_a_deleted_one(self, fields: dict[str, Any]) -> None:
        model = get_peft_model(Mlp(), WaRAConfig(**fields), adapter_name="gone")
        held = list(attributes_by_adapter(model, "gone"))
        assert {"wara_A", "wara_B", "scaling", "r", "peft_config"} <= {name for name, _ in held}
        model.delete_adapter("gone")
        assert [name for name, value in held if "gone" in value] == []
        assert not any("gone" in name for name, _ in model.named_parameters())

    def test_the_other_ones_stay(self) -> None:
        model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], init_weights=False))
        x = torch.randn(2, 12)
        expected = model(x)
        model.add_adapter("gone", WaRAConfig(target_modules=["up", "down"], init_weights=False))
        model.delete_adapter("gone")
        assert torch.equal(model(x), expected) and module_shapes(model) == {"up": ["Linear", 20, 12]}


class TestRanksOfLayers:
    def test_r_is_one_mapping_that_follows_the_adapters(self) -> None:
        model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], r=3))
        up = model.base_model.model.up
        ranks = up.r
        assert ranks == {"default": 12}
        model.add_adapter("other", WaRAConfig(target_modules=["up"], r=1, levels=2))
        assert ranks == {"default": 12, "other": 7}
        keep_components(model, "default", {"up": {"aa1": [0, 2], "dd1": [1]}})
        assert ranks == {"default": 3, "other": 7}
        model.delete_adapter("other")
        assert ranks == {"default": 3} and up.r is ranks
        assert {name: layer.r for name, layer in layers_of(model, "default").items()} == {"up": ranks}


HEADS = {
    "TOKEN_CLS": (AutoModelForTokenClassification, "classifier"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "qa_outputs"),
    "SEQ_CLS": (AutoModelForSequenceClassification, "classifier"),
}


class TestHeadsOfTasks:
    """PEFT adds them to `modules_to_save` of the object that was passed in, for two tasks after the tuner was made."""

    @staticmethod
    def base(task: str) -> nn.Module:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=2 if task == "QUESTION_ANS" else 3,
        )
        model: nn.Module = HEADS[task][0].from_config(config).eval()
        return model

    @staticmethod
    @torch.no_grad()
    def output(model: nn.Module) -> torch.Tensor:
        result = model(TOKENS)
        return result["start_logits"] if "start_logits" in result else result["logits"]

    def trained(self, task: str, modules_to_save: list[str] | None) -> PeftModel:
        config = WaRAConfig(
            task_type=task, target_modules=["query"], modules_to_save=modules_to_save, init_weights=False
        )
        torch.manual_seed(1)
        model = get_peft_model(self.base(task), config).eval()
        head = dict(model.named_parameters())
        for name, parameter in head.items():
            if HEADS[task][1] in name and parameter.requires_grad:
                parameter.data.add_(1.0)
        assert model.peft_config["default"] is config
        return model

    @pytest.mark.parametrize("modules_to_save", [None, ["key"]], ids=["none of its own", "one of its own"])
    @pytest.mark.parametrize("task", [*HEADS])
    def test_are_trained_saved_and_loaded(self, task: str, modules_to_save: list[str] | None, tmp_path: Path) -> None:
        model = self.trained(task, modules_to_save)
        expected = self.output(model)
        assert (expected - self.output(self.base(task))).abs().max() > 0.1
        model.save_pretrained(tmp_path)
        fields = json.loads((tmp_path / "adapter_config.json").read_text())
        assert {HEADS[task][1], *(modules_to_save or ())} <= set(fields["modules_to_save"])
        assert fields["module_shapes"] == {"bert.encoder.layer.0.attention.self.query": ["Linear", 16, 16]}
        assert torch.equal(self.output(PeftModel.from_pretrained(self.base(task), tmp_path).eval()), expected)

    @pytest.mark.parametrize("modules_to_save", [None, ["key"]], ids=["none of its own", "one of its own"])
    @pytest.mark.parametrize("task", [*HEADS])
    def test_transformers_loads_and_disables_them(
        self, task: str, modules_to_save: list[str] | None, tmp_path: Path
    ) -> None:
        model = self.trained(task, modules_to_save)
        model.save_pretrained(tmp_path)
        loaded = self.base(task)
        loaded.load_adapter(str(tmp_path))
        assert torch.equal(self.output(loaded), self.output(model))
        loaded.disable_adapters()
        assert torch.equal(self.output(loaded), self.output(self.base(task)))
