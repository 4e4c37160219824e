"""WaRAModel through PEFT: training, saving, several adapters, errors that leave the model untouched, merging."""

from __future__ import annotations

import copy
import json
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.cases import LARGE, each_case, every_form_and_kind, whole_models
from tests.models import llama, run
from tests.references import Chain, Conv1DModel, Mlp, module_shapes
from wara_peft import WaRAConfig, WaRAModel
from wara_peft.layers.base import WaRALayer
from wara_peft.layers.linear import Linear

# of the embedding that PEFT saves with its adapters, and of an index in the model's config
TIES = "ignore:Model with `tie_word_embeddings|Could not find a config file|Setting `save_embedding_layers`"


@pytest.mark.filterwarnings("ignore:levels=. is more than is useful", TIES)
class TestEveryCase:
    @each_case(parts=LARGE)
    def test_a_new_adapter_changes_nothing_and_trains(self, case):
        base, model = case.base(), case.adapted(init=True)
        before = case.output(base)
        assert {shape[0] for shape in module_shapes(model).values()} == set(case.kinds)
        tolerance = 0 if case.same_kernels else 1e-6
        torch.testing.assert_close(case.output(model), before, atol=tolerance, rtol=tolerance)
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        has_biases = "bias" in case.fields
        besides = ("modules_to_save", "trainable_tokens", *(["bias"] if has_biases else []))
        assert any(".wara_" in name for name in trainable)
        assert all(any(part in name for part in (".wara_", *besides)) for name in trainable)

        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            run(model, case.inputs).square().mean().backward()
            optimizer.step()
        after = case.output(model)
        assert after.isfinite().all() and not torch.allclose(after, before)
        if not has_biases:  # which stay as they are trained, as in LoRA
            with model.disable_adapter():
                torch.testing.assert_close(case.output(model), before, atol=tolerance, rtol=tolerance)

    @each_case(parts=LARGE)
    def test_save_and_load(self, case, tmp_path):
        model = case.adapted()
        model.save_pretrained(tmp_path)
        expected = case.output(model)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(case.output(loaded), expected)
        assert module_shapes(loaded) == module_shapes(model)

    @each_case("merge", parts=LARGE, where=lambda case: case.merges_exactly)
    def test_merge_and_unload_then_save_as_a_plain_model(self, case, tmp_path):
        model = case.adapted()
        expected = case.output(model)
        merged = copy.deepcopy(model).merge_and_unload()
        assert type(merged) is type(case.base())
        assert not any(isinstance(module, WaRALayer) for module in merged.modules())
        torch.testing.assert_close(case.output(merged), expected, atol=1e-5, rtol=1e-5)
        if case.is_of_transformers:
            merged.save_pretrained(tmp_path)
            plain = type(merged).from_pretrained(tmp_path)
            torch.testing.assert_close(case.output(plain), expected, atol=1e-5, rtol=1e-5)

        model.merge_adapter()
        torch.testing.assert_close(case.output(model), expected, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(case.output(model), expected, atol=1e-5, rtol=1e-5)
        if not any(p.requires_grad and ".wara_" not in name for name, p in model.named_parameters()):
            weights = model.unload().state_dict()
            assert all(torch.equal(weights[name], value) for name, value in case.base().state_dict().items())

    @each_case(
        parts=[whole_models],
        where=lambda case: case.form == "grid" or case.name in ("llama, all-linear", "gpt2, shared", "llama, tiny"),
    )
    def test_adapters_of_transformers(self, case, tmp_path):
        model = case.adapted()
        expected, before = case.output(model), case.output(case.base())
        model.save_pretrained(tmp_path / "from_peft")

        loaded = case.base()
        loaded.load_adapter(str(tmp_path / "from_peft"))
        assert torch.equal(case.output(loaded), expected)
        loaded.disable_adapters()
        assert torch.equal(case.output(loaded), before)
        loaded.enable_adapters()
        loaded.save_pretrained(tmp_path / "from_transformers")
        assert "import wara_peft" in (tmp_path / "from_transformers" / "README.md").read_text()
        again = PeftModel.from_pretrained(case.base(), tmp_path / "from_transformers")
        assert torch.equal(case.output(again), expected)

        added = case.base()
        added.add_adapter(case.config())
        assert torch.equal(case.output(added), before)
        assert added.active_adapters() == ["default"]

    @each_case(parts=(every_form_and_kind, whole_models), where=lambda case: case.form != "subband")
    def test_is_switched_and_saved_beside_another(self, case, tmp_path):
        model = case.adapted()
        first = case.output(model)
        targets = {name: case.fields.get(name) for name in ("target_modules", "target_parameters")}
        model.add_adapter("other", WaRAConfig(**targets, init_weights=False))
        assert torch.equal(case.output(model), first)
        model.set_adapter("other")
        second = case.output(model)
        assert not torch.allclose(second, first)
        with model.disable_adapter():
            assert torch.equal(case.output(model), case.output(case.base()))
        model.set_adapter("default")
        assert torch.equal(case.output(model), first)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.base(), tmp_path)
        loaded.load_adapter(tmp_path / "other", adapter_name="renamed")
        assert torch.equal(case.output(loaded), first)
        loaded.set_adapter("renamed")
        assert torch.equal(case.output(loaded), second)
        loaded.delete_adapter("default")
        assert torch.equal(case.output(loaded), second)
        assert not any("default" in name for name in loaded.state_dict())


class TestKeysOnDisk:
    def test_names_and_shapes(self, tmp_path):
        model = get_peft_model(Mlp(), WaRAConfig(r=2, levels=2, target_modules=["up"], subband_ranks={"aa0": 1}))
        model.save_pretrained(tmp_path)
        found = {key: tuple(value.shape) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
        assert found == {
            "base_model.model.up.wara_A.level0": (1, 12),
            "base_model.model.up.wara_A.level1": (6, 6),
            "base_model.model.up.wara_A.level2": (8, 3),
            "base_model.model.up.wara_B.level0": (20, 1),
            "base_model.model.up.wara_B.level1": (10, 6),
            "base_model.model.up.wara_B.level2": (5, 8),
        }
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["peft_type"] == "WARA"
        assert config["module_shapes"] == {"up": ["Linear", 20, 12]}
        assert "import wara_peft" in (tmp_path / "README.md").read_text()

    def test_shared_form_and_conv1d(self, tmp_path):
        model = get_peft_model(Conv1DModel(), WaRAConfig(r=3, form="shared", target_modules=["proj"]))
        model.save_pretrained(tmp_path)
        found = {key: tuple(value.shape) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
        assert found == {"base_model.model.proj.wara_A.level1": (3, 5), "base_model.model.proj.wara_B.level1": (7, 3)}
        assert module_shapes(model) == {"proj": ["Conv1D", 14, 9]}


class TestSeveralAdapters:
    def model(self) -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"], init_weights=False))
        other = WaRAConfig(r=2, wavelet="db2", target_modules=["up"], init_weights=False)
        model.add_adapter("other", other)
        return model.eval()

    def test_add_switch_disable_delete(self):
        model, x = self.model(), torch.randn(4, 12)
        with model.disable_adapter():
            base = model(x)
        first = model(x)
        model.set_adapter("other")
        second = model(x)
        assert not torch.allclose(first, base)
        assert not torch.allclose(first, second)
        model.set_adapter("default")
        assert torch.equal(model(x), first)
        model.delete_adapter("other")
        assert torch.equal(model(x), first)
        assert not any("other" in name for name in model.state_dict())
        with pytest.warns(UserWarning, match="Adapter default was active"):
            model.add_adapter("last", WaRAConfig(target_modules=["up"]))
            model.delete_adapter("default")
        assert torch.equal(model(x), base)

    def test_a_further_adapter_is_frozen_until_it_is_active(self):
        model = self.model()

        def trainable() -> set[str]:
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            return {name.split(".")[-2] for name in names}

        assert trainable() == {"default"}
        model.set_adapter("other")
        assert trainable() == {"other"}

    def test_both_active_add_up_and_merge(self):
        model, x = self.model(), torch.randn(4, 12)
        model.base_model.set_adapter(["default", "other"])
        up = model.base_model.model.up
        expected = up.base_layer(x) + x @ (up.get_delta_weight("default") + up.get_delta_weight("other")).T
        torch.testing.assert_close(up(x), expected, atol=1e-5, rtol=1e-5)
        before = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)

    def test_both_are_saved_and_loaded(self, tmp_path):
        model, x = self.model(), torch.randn(4, 12)
        first = model(x)
        model.set_adapter("other")
        second = model(x)
        model.save_pretrained(tmp_path)
        assert "import wara_peft" in (tmp_path / "README.md").read_text()
        loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
        loaded.load_adapter(tmp_path / "other", adapter_name="renamed")
        assert torch.equal(loaded.eval()(x), first)
        loaded.set_adapter("renamed")
        assert torch.equal(loaded(x), second)


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after["types"] == before["types"]
    assert after["requires_grad"] == before["requires_grad"]
    assert all(torch.equal(after["weights"][name], value) for name, value in before["weights"].items())


class Mixed(nn.Module):
    """Linear layers first, so that an error that comes late would find them replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.bag = nn.EmbeddingBag(6, 6)
        self.norm = nn.LayerNorm(6)


BAD_INJECTIONS = {
    "unsupported target": (
        {"target_modules": ["first", "norm", "bag"]},
        TypeError,
        r"Target module bag \(EmbeddingBag\), norm \(LayerNorm\) is not supported.*Linear.*Conv1D.*exclude_modules",
    ),
    "no target matched": ({"target_modules": ["query"]}, ValueError, "Target modules.*query.*not found"),
    "no target given": ({}, ValueError, "Please specify `target_modules`"),
    "a module without ranks": (
        {
            "target_modules": ["first", "second"],
            "rank_pattern": {"second": dict.fromkeys(["aa1", "ad1", "da1", "dd1"], 0)},
        },
        ValueError,
        "leaves every subband out in module 'second'",
    ),
}


class TestBadInput:
    @pytest.mark.parametrize("case", BAD_INJECTIONS)
    def test_errors_leave_the_model_untouched(self, case):
        fields, error, message = BAD_INJECTIONS[case]
        model = Mixed()
        before = snapshot(model)
        with pytest.raises(error, match=message):
            get_peft_model(model, WaRAConfig(**fields))
        assert_unchanged(model, before)

    @pytest.mark.parametrize("case", BAD_INJECTIONS)
    def test_errors_of_a_second_adapter_leave_the_model_untouched(self, case):
        fields, error, message = BAD_INJECTIONS[case]
        model = get_peft_model(Mixed(), WaRAConfig(target_modules=["first"]))
        before = snapshot(model)
        with pytest.raises(error, match=message):
            model.add_adapter("other", WaRAConfig(**fields))
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default"]

    @pytest.mark.parametrize("name", ["level0", "level1", "level12", "weight", "aa1", "dd12", "A_level1"])
    def test_names_of_parameters_are_refused(self, name):
        model = Mixed()
        before = snapshot(model)
        config = WaRAConfig(target_modules=["first"])
        with pytest.raises(ValueError, match=f"adapter_name='{name}' is also the name"):
            get_peft_model(model, config, adapter_name=name)
        assert_unchanged(model, before)

    def test_transformers_model_keeps_no_failed_adapter(self):
        model = llama()
        model.add_adapter(WaRAConfig(target_modules=["q_proj"]))
        with pytest.raises(TypeError, match="not supported"):
            model.add_adapter(WaRAConfig(target_modules=["q_proj", "norm"]), adapter_name="other")
        assert list(model.peft_config) == ["default"]

    def test_a_config_serves_models_of_several_widths(self):
        config = WaRAConfig(target_modules=["up"])
        get_peft_model(Mlp(12), config)
        assert module_shapes(get_peft_model(Mlp(8), config)) == {"up": ["Linear", 20, 8]}

    @pytest.mark.parametrize("width", [8, 11])  # 11 has coefficients of the same shapes as 12
    @pytest.mark.parametrize("form", ["subband", "tiny"])
    def test_a_loaded_config_serves_other_models(self, width, form, tmp_path):
        config = WaRAConfig(target_modules=["up"], form=form, r=2)
        get_peft_model(Mlp(12), config).save_pretrained(tmp_path / "first")
        loaded = WaRAConfig.from_pretrained(tmp_path / "first")
        loaded.inference_mode = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = get_peft_model(Mlp(width), loaded)
        assert module_shapes(model) == {"up": ["Linear", 20, width]}
        assert model(torch.randn(2, width)).isfinite().all()
        model.save_pretrained(tmp_path / "second")
        again = PeftModel.from_pretrained(Mlp(width), tmp_path / "second")
        assert module_shapes(again) == {"up": ["Linear", 20, width]}
        if width == 8:  # its own checkpoints load, as when training resumes
            model.load_adapter(tmp_path / "second", "default", is_trainable=True)

    @pytest.mark.filterwarnings("ignore:The saved adapter was made")
    @pytest.mark.parametrize("width", [8, 11])
    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_a_saved_adapter_of_another_model_is_refused_and_taken_out_again(self, width, is_trainable, tmp_path):
        get_peft_model(Mlp(12), WaRAConfig(target_modules=["up"])).save_pretrained(tmp_path)
        message = rf"other \(out, in\) shapes: 'up' \(saved \(20, 12\), here \(20, {width}\)\)"
        base = Mlp(width)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable)
        assert type(base.up) is nn.Linear
        model = get_peft_model(Mlp(width), WaRAConfig(target_modules=["down"]))
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path, "other", is_trainable=is_trainable)
        assert list(model.peft_config) == ["default"]
        assert model(torch.randn(2, width)).isfinite().all()

    def test_transformers_loading_warns_of_another_model(self, tmp_path):
        model = llama()
        model.add_adapter(WaRAConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        name, (kind, out, in_) = next(iter(config["module_shapes"].items()))
        config["module_shapes"][name] = [kind, out, in_ - 1]
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.warns(UserWarning, match=r"made for modules of other \(out, in\) shapes"):
            llama().load_adapter(str(tmp_path))

    def test_a_second_injection_from_an_outer_root_reads_patterns_by_the_outer_names(self):
        inner = Mlp()
        get_peft_model(inner, WaRAConfig(target_modules=["up"]))
        outer = nn.ModuleDict({"encoder": inner})
        config = WaRAConfig(
            target_modules=["encoder.up"], rank_pattern={"^encoder.up": 7}, alpha_pattern={"^encoder.up": 14}
        )
        inject_adapter_in_model(config, outer, "other")
        assert inner.up.total_rank("other") == 28
        assert inner.up.scaling["other"] == 0.5
        assert inner.up.total_rank("default") == 16

    def test_targets_named_by_a_state_dict_are_checked_too(self):
        model = Mixed()
        before = snapshot(model)
        keys = ["first.wara_A.level1", "norm.wara_A.level1"]
        with pytest.raises(TypeError, match=r"norm \(LayerNorm\) is not supported"):
            inject_adapter_in_model(
                WaRAConfig(target_modules=["first"]), model, state_dict={key: torch.zeros(1) for key in keys}
            )
        assert_unchanged(model, before)

    def test_too_many_levels_warn_once(self):
        with pytest.warns(UserWarning) as caught:
            get_peft_model(Chain(width=8, depth=5), WaRAConfig(levels=4, target_modules=r"layers\.\d"))
        assert len(caught) == 1
        message = str(caught[0].message)
        assert "'layers.0' (out axis of length 8: at most 3)" in message
        assert "7 more" in message

    def test_one_channel_axes_work(self):
        model = nn.Sequential(nn.Linear(1, 5), nn.Linear(5, 1))
        with pytest.warns(UserWarning, match=r"in axis of length 1: at most 0"):
            adapted = get_peft_model(model, WaRAConfig(target_modules=["0", "1"], init_weights=False)).eval()
        x = torch.randn(3, 1)
        expected = adapted(x)
        torch.testing.assert_close(adapted.merge_and_unload()(x), expected)

    def test_two_outputs_warn(self):
        with pytest.warns(UserWarning, match="Module 'head' has two outputs.*modules_to_save"):
            get_peft_model(Mlp(classes=2), WaRAConfig(target_modules=["up", "head"]))


class TestBadFiles:
    """One clear error; the base is bit-identical, and the broken adapter can be unloaded."""

    def saved(self, path) -> Mlp:
        torch.manual_seed(0)
        base = Mlp()
        model = get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["up", "down"], init_weights=False))
        model.save_pretrained(path)
        return base

    def corrupt(self, path, kind: str) -> None:
        weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
        if kind == "truncated":
            weights.write_bytes(weights.read_bytes()[:-40])
        elif kind == "wrong shape":
            state = load_file(weights)
            state["base_model.model.down.wara_A.level1"] = torch.zeros(16, 9)
            save_file(state, weights)
        elif kind == "unknown form":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"form": "fractal"}))

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("truncated", "(?i)incomplete|header|safetensor"),
            ("wrong shape", "size mismatch for base_model.model.down.wara_A"),
            ("unknown form", "form='fractal'"),
        ],
    )
    def test_loading(self, tmp_path, kind, message):
        base = self.saved(tmp_path)
        self.corrupt(tmp_path, kind)
        weights = {name: value.clone() for name, value in base.state_dict().items()}

        with pytest.raises(Exception, match=message):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)

        model = get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["up"]))
        with pytest.raises(Exception, match=message):
            model.load_adapter(tmp_path, adapter_name="broken")
        plain = model.unload()
        assert plain.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())

    @pytest.mark.filterwarnings("ignore:The saved adapter was made")
    def test_a_base_of_another_shape(self, tmp_path):
        self.saved(tmp_path)
        other = Mlp(width=10)
        before = snapshot(other)
        with pytest.raises(ValueError, match=r"'up' \(saved \(20, 12\), here \(20, 10\)\)"):
            PeftModel.from_pretrained(other, tmp_path)
        assert_unchanged(other, before)

    def test_a_base_without_a_saved_module_warns(self, tmp_path):
        self.saved(tmp_path)
        with pytest.warns(UserWarning, match="also adapts 'down'"):
            PeftModel.from_pretrained(nn.ModuleDict({"up": nn.Linear(12, 20)}), tmp_path)


class TestAllOrNothingMerge:
    def model(self) -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(Chain(), WaRAConfig(target_modules=r"layers\.\d", init_weights=False))
        model.add_adapter("other", WaRAConfig(r=1, target_modules=r"layers\.\d", init_weights=False))
        return model

    def third(self, model: PeftModel) -> Linear:
        return model.base_model.model.layers[2]

    @pytest.mark.parametrize("how", ["nan", "exception"])
    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    def test_failure_at_the_third_of_five_modules(self, method, how, monkeypatch):
        model = self.model()
        if how == "nan":
            self.third(model).wara_A["default"].level1.data[0, 0] = float("nan")
        else:
            monkeypatch.setattr(self.third(model), "set_base_weight", self.fail)
        x = torch.randn(2, 8)
        before, expected = snapshot(model), model(x)

        with pytest.raises(ValueError, match="NaNs detected" if how == "nan" else "no memory") as raised:
            getattr(model, method)(safe_merge=True)
        if sys.version_info >= (3, 11):  # before, exceptions take no notes
            assert raised.value.__notes__ == ["This happened while merging into module 'layers.2'."]

        assert all(isinstance(layer, Linear) for layer in model.base_model.model.layers)
        after = snapshot(model)
        assert after["types"] == before["types"]
        for name, value in before["weights"].items():
            assert torch.equal(after["weights"][name].nan_to_num(), value.nan_to_num()), name
        assert not any(layer.merged for layer in model.base_model.model.layers)
        assert list(model.peft_config) == ["default", "other"]
        torch.testing.assert_close(model(x), expected, atol=0, rtol=0, equal_nan=True)

    @staticmethod
    def fail(*args, **kwargs) -> None:
        raise ValueError("no memory left")

    def test_an_adapter_merged_before_stays_merged(self):
        model = self.model()
        model.merge_adapter(adapter_names=["other"])
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.third(model).wara_A["default"].level1.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaNs"), pytest.warns(UserWarning, match="were merged"):
            model.merge_adapter(adapter_names=["default"], safe_merge=True)
        for layer in model.base_model.model.layers:
            assert layer.merged_adapters == ["other"]
        for name, value in weights.items():
            if "wara" not in name:
                assert torch.equal(model.state_dict()[name], value)


def test_supports_lora_conversion():
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"]))
    assert model.supports_lora_conversion()


def test_bias_trains_and_is_saved(tmp_path):
    torch.manual_seed(0)
    base = Mlp()
    model = get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["up"], bias="wara_only"))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "wara" not in n} == {
        "base_model.model.up.base_layer.bias"
    }
    model.base_model.model.up.base_layer.bias.data.fill_(3.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert loaded.base_model.model.up.base_layer.bias.eq(3.0).all()


def test_trainable_parameters_are_those_of_lora_of_rank_8():
    counts = [
        get_peft_model(llama(), config).get_nb_trainable_parameters()[0]
        for config in (WaRAConfig(target_modules="all-linear"), LoraConfig(r=8, target_modules="all-linear"))
    ]
    assert counts[0] == counts[1]


def test_is_a_peft_tuner():
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"]))
    assert isinstance(model.base_model, WaRAModel)
    assert repr(model.base_model.model.up).startswith("wara.Linear(")
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.active_adapters, status.peft_types) == (
        1,
        ["default"],
        {"default": "WARA"},
    )


@pytest.mark.slow
@pytest.mark.compiler
def test_compiles_without_graph_breaks():
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"], levels=2, init_weights=False))
    x = torch.randn(4, 12)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_functional_transforms_and_tracing():
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"], levels=2, init_weights=False)).eval()
    x = torch.randn(4, 12)
    parameters = {name: p.detach() for name, p in model.named_parameters() if "wara" in name}

    def loss(values, x):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    model(x).square().sum().backward()
    gradients = torch.func.grad(loss)(parameters, x)
    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for name, parameter in model.named_parameters():
        if "wara" in name:
            torch.testing.assert_close(gradients[name], parameter.grad)
            torch.testing.assert_close(by_sample[name].sum(0), parameter.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_a_forward_with_fake_tensors_leaves_nothing_behind():
    model = get_peft_model(Mlp(width=14), WaRAConfig(target_modules=["up"], wavelet="sym2"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(2, 14))
    assert type(model(torch.randn(2, 14))) is torch.Tensor
