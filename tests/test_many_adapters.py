"""Several adapters at once: mixed batches by `adapter_names`, against one pass for each adapter."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import (
    FourierFTConfig,
    GraloraConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PeftModel,
    WaveFTConfig,
    get_peft_model,
)
from torch import nn

from tests.cases import each_case, every_form_and_kind, settings_of_convolutions, weights_besides_layers
from tests.models import Everything, llama, t5
from wara_peft import WaRAConfig, to_lora
from wara_peft.layers.base import WaRALayer

TOKENS = torch.arange(3, 23).view(4, 5)
NAMES = ["default", "other", "__base__", "default"]
MODELS = {
    "everything": (Everything, ["embedding", "conv", "linear"], ["conv", "linear"]),
    "llama": (llama, ["q_proj", "down_proj"], "all-linear"),
    "t5": (t5, ["q", "v"], ["wo"]),
}


def build(case: str) -> PeftModel:
    make, targets, other_targets = MODELS[case]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "levels=")
        model = get_peft_model(make(), WaRAConfig(target_modules=targets, init_weights=False, wara_alpha=64))
        other = WaRAConfig(
            target_modules=other_targets, init_weights=False, form="shared", wavelet="db2", r=2, wara_alpha=64
        )
        model.add_adapter("other", other)
    return model.eval()


def outputs(model: PeftModel, **kwargs) -> torch.Tensor:
    if hasattr(model.get_base_model(), "config") and model.get_base_model().config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = TOKENS
    with torch.no_grad():
        result = model(input_ids=TOKENS, **kwargs)
    return result if isinstance(result, torch.Tensor) else result.logits


def one_by_one(model: PeftModel, compute, other: str = "other") -> dict[str, torch.Tensor]:
    """What each adapter computes alone, and the base model."""
    results = {}
    for name in ("default", other):
        model.set_adapter(name)
        results[name] = compute()
    with model.disable_adapter():
        results["__base__"] = compute()
    model.set_adapter("default")
    return results


@pytest.mark.filterwarnings("ignore:levels=")
@each_case("mixed batch", parts=(every_form_and_kind, settings_of_convolutions, weights_besides_layers))
def test_forward(case):
    """The second adapter differs in its values only, which must not be mixed up."""
    model = case.with_twin()
    alone = one_by_one(model, lambda: case.output(model), "twin")
    assert not torch.allclose(alone["default"], alone["twin"], atol=1e-3)
    for names in (["default", "twin"], ["twin", "__base__"]):
        expected = torch.stack([alone[name][index] for index, name in enumerate(names)])
        torch.testing.assert_close(case.output(model, adapter_names=names), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", MODELS)
def test_forward_of_adapters_with_other_targets(case):
    model = build(case)
    alone = one_by_one(model, lambda: outputs(model))
    expected = torch.stack([alone[name][index] for index, name in enumerate(NAMES)])
    assert not torch.allclose(alone["default"], alone["other"], atol=1e-3)
    found = outputs(model, adapter_names=NAMES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(model), alone["default"])


@pytest.mark.parametrize("more", [{"trainable_token_indices": [3, 7]}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_forward_where_one_adapter_trains_more_than_factors(more, reverse):
    configs = [WaRAConfig(target_modules=["q_proj"], init_weights=False, **fields) for fields in (more, {})]
    model = get_peft_model(llama(), configs[reverse])
    model.add_adapter("other", configs[not reverse])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens" in name:
            nn.init.normal_(parameter.data)
    model.eval()
    for active in ("default", "other"):
        alone = one_by_one(model, lambda: outputs(model))
        model.set_adapter(active)
        expected = torch.stack([alone[name][index] for index, name in enumerate(NAMES)])
        torch.testing.assert_close(outputs(model, adapter_names=NAMES), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", ["llama", "t5"])
def test_generate(case, beams):
    model = build(case)

    def generate(**kwargs) -> torch.Tensor:
        limits = {"min_new_tokens": 6, "max_new_tokens": 6, "num_beams": beams, "do_sample": False}
        return model.generate(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **limits, **kwargs)

    alone = one_by_one(model, generate)
    expected = torch.stack([alone[name][index] for index, name in enumerate(NAMES)])
    assert not torch.equal(alone["default"], alone["__base__"])
    assert torch.equal(generate(adapter_names=NAMES), expected)


class TestBadInput:
    def test_unknown_name(self):
        with pytest.raises(ValueError, match="non-existing adapter\\(s\\): nobody"):
            outputs(build("everything"), adapter_names=["default", "nobody", "__base__", "other"])

    def test_wrong_number_of_names(self):
        with pytest.raises(ValueError, match="same as the number of inputs, but got 1 and 4"):
            outputs(build("everything"), adapter_names=["default"])

    def test_training(self):
        with pytest.raises(ValueError, match="in training mode"):
            outputs(build("everything").train(), adapter_names=NAMES)

    def test_merged(self):
        model = build("everything")
        model.merge_adapter()
        with pytest.raises(ValueError, match="there are merged adapters"):
            outputs(model, adapter_names=NAMES)

    def test_hooks_do_not_stay_when_forward_raises(self):
        model = build("everything")
        with pytest.raises(ValueError, match="same as the number of inputs"):
            outputs(model, adapter_names=["default"])
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert outputs(model).shape == (4, 5, 6)


class TestWeightedAdapters:
    def delta_of(self, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, WaRALayer) and name in m.wara_A}
        return {layer_name: layer.get_delta_weight(name).detach() for layer_name, layer in layers.items()}

    @pytest.mark.filterwarnings("ignore:levels=|Model with `tie_word_embeddings")
    @each_case("combine", parts=(every_form_and_kind, weights_besides_layers))
    def test_cat_of_every_case_is_exact(self, case):
        model = case.with_twin()
        model.add_weighted_adapter(["default", "twin"], [0.7, -1.5], "combined", "cat")
        ours, twins, found = (self.delta_of(model, name) for name in ("default", "twin", "combined"))
        assert found.keys() == ours.keys()
        for name, delta in found.items():
            torch.testing.assert_close(delta, 0.7 * ours[name] - 1.5 * twins[name], atol=1e-5, rtol=1e-5)

    def with_twin(self) -> PeftModel:
        """Adapters default and twin of one wavelet, levels and form, but other ranks and modules."""
        model = build("everything")
        twin = WaRAConfig(
            target_modules=["conv", "linear"],
            init_weights=False,
            rank_pattern={"conv": {"aa1": 1, "dd1": 0, "aa0": 2}},
        )
        model.add_adapter("twin", twin)
        return model

    @pytest.mark.parametrize("others", [["other"], ["twin"], ["twin", "other"]])
    def test_cat_is_exact(self, others, tmp_path):
        model = self.with_twin()
        names, weights = ["default", *others], [0.7, -1.5, 2.0][: 1 + len(others)]
        model.add_weighted_adapter(names, weights, "combined", "cat")
        deltas = {name: self.delta_of(model, name) for name in [*names, "combined"]}
        for layer_name, found in deltas["combined"].items():
            expected = sum(
                weight * deltas[name][layer_name]
                for name, weight in zip(names, weights, strict=True)
                if layer_name in deltas[name]
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert set(deltas["combined"]) == set().union(*(deltas[name] for name in names))
        in_subbands = others == ["twin"]
        linear = model.base_model.model.linear
        assert ("aa1" in linear.wara_A["combined"].subbands) == in_subbands
        assert linear.total_rank("combined") == sum(linear.total_rank(name) for name in names)

        assert model.active_adapter == "default"
        model.set_adapter("combined")
        expected = outputs(model.requires_grad_(False))  # as what is loaded is, or products take other kernels
        model.save_pretrained(tmp_path, selected_adapters=["combined"])
        base = model.unload()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "levels=")
            loaded = PeftModel.from_pretrained(base, tmp_path / "combined").eval()
        assert torch.equal(outputs(loaded), expected)

    def test_linear_is_loras(self):
        model = build("everything")
        model.add_adapter("twin", WaRAConfig(target_modules=["embedding", "conv", "linear"], init_weights=False))
        model.add_weighted_adapter(["default", "twin"], [2.0, -0.5], "combined", combination_type="linear")
        linear = model.base_model.model.linear
        expected_a = (2.0 * 4) ** 0.5 * linear.wara_A["default"].level1 - 0.5**0.5 * linear.wara_A["twin"].level1
        expected_b = (2.0 * 4) ** 0.5 * linear.wara_B["default"].level1 + 0.5**0.5 * linear.wara_B["twin"].level1
        torch.testing.assert_close(linear.wara_A["combined"].level1, expected_a)
        torch.testing.assert_close(linear.wara_B["combined"].level1, expected_b)
        assert linear.scaling["combined"] == 1.0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["default", "nobody"], [1.0, 1.0], "new"), "Adapter nobody does not exist"),
            ((["default", "other"], [1.0], "new"), "a weight for each adapter, got 2 and 1"),
            (([], [], "new"), "a weight for each adapter"),
            ((["default", "other"], [1.0, 1.0], "other"), "Adapter other already exists"),
            (
                (["default", "other"], [1.0, 1.0], "new", "tiles"),
                "combination_type='tiles' is not one of 'cat', 'linear', 'ties'",
            ),
            ((["default", "other"], [1.0, 1.0], "new", "ties"), "'ties' needs `density`, the share of values"),
            ((["default", "other"], [1.0, 1.0], "new", "linear"), "needs equal layouts"),
        ],
    )
    def test_bad_input(self, arguments, message):
        model = build("everything")
        before = set(model.state_dict())
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
        assert set(model.state_dict()) == before
        assert list(model.peft_config) == ["default", "other"]

    def test_modules_with_the_same_ending_are_left_alone(self):
        model = get_peft_model(
            nn.ModuleDict({"up": nn.Linear(8, 8), "block": nn.ModuleDict({"up": nn.Linear(8, 8)})}),
            WaRAConfig(target_modules=["up"], exclude_modules=["block.up"], init_weights=False),
        )
        model.add_adapter("other", WaRAConfig(target_modules=["up"], exclude_modules=["block.up"]))
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "combined")
        adapted = {name for name, m in model.named_modules() if isinstance(m, WaRALayer)}
        assert adapted == {"base_model.model.up"}
        config, _ = to_lora(model, adapter_name="combined")
        assert config.exclude_modules == r"block\.up"


@pytest.mark.parametrize(
    "config",
    [
        MissConfig(r=2, init_weights=False),
        WaveFTConfig(n_frequency=9, init_weights=False),
        LoKrConfig(r=2, init_weights=False),
        LoHaConfig(r=2, init_weights=False),
        GraloraConfig(r=2, init_weights=False),
        FourierFTConfig(n_frequency=9, init_weights=False),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_of_peft_give_all_samples_the_active_adapter(config):
    """What docs/serving.md says. When one of these fails, PEFT has mended it, and the page is to be corrected."""
    config.target_modules = ["q_proj", "v_proj"]
    model = get_peft_model(llama(), config)
    model.add_adapter("other", copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if ".default" in name or ".other" in name:
            nn.init.normal_(parameter, std=0.3)
    model.eval()
    alone = one_by_one(model, lambda: outputs(model))
    assert not torch.allclose(alone["default"], alone["other"], atol=1e-3)
    torch.testing.assert_close(outputs(model, adapter_names=NAMES), alone["default"], atol=1e-5, rtol=1e-5)
