"""Adapters that diffusers' `add_adapter` makes: what the methods of its models do with WaRA, and with LoRA."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from functools import cache

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.diffusion_models import TINY, WIDTH, sd3_transformer, unet
from tests.lora.test_diffusers import CLOSE, adapted, config, read, say
from tests.references import descend
from wara_peft import WaRAConfig, frozen_factors, save_as_lora
from wara_peft.disk.adapters.adapter import SavedAdapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:levels=. is more than is useful:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
]
MODELS = {
    "unet": (unet, r"conv_in|.*(attn1\.to_[qk]|to_out\.0|resnets\.0\.conv1|conv_shortcut|samplers\.0\.conv)"),
    "transformer": (sd3_transformer, TINY["SD3"].targets["transformer"]),
}
FILE = "pytorch_lora_weights.safetensors"


def output(component: str, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    image, text, pooled = (
        torch.randn(size, generator=generator) for size in ((1, 4, 8, 8), (1, 5, WIDTH), (1, WIDTH))
    )
    step = torch.tensor([5])
    with torch.no_grad():
        if component == "unet":
            return model(image, step, text).sample
        return model(image, encoder_hidden_states=text, pooled_projections=pooled, timestep=step).sample


@pytest.fixture(params=MODELS)
def component(request) -> str:
    return request.param


def two(component: str) -> nn.Module:
    """A model with the adapters "fine", on convolutions too, and "style", both active."""
    return copy.deepcopy(_two(component))


@cache
def _two(component: str) -> nn.Module:
    make, targets = MODELS[component]
    model = make()
    torch.manual_seed(1)
    model.add_adapter(config(targets, wavelet="db2"), "fine")
    model.add_adapter(config(["to_q", "to_out.0"], form="shared"), "style")
    model.set_adapters(["fine", "style"])
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str, str], dict[str, object]]:
    """What `load_lora_adapter` takes for an adapter of a component, exported as a LoRA."""
    directory = tmp_path_factory.mktemp("exported")
    for component in MODELS:
        for name in ("fine", "style"):
            save_as_lora(directory / component / name, _two(component), adapter_name=name, format="diffusers")

    def arguments(component: str, name: str) -> dict[str, object]:
        path = directory / component / name / FILE
        found = {"pretrained_model_name_or_path_or_dict": path, "prefix": component, "adapter_name": name}
        return {**found, "use_safetensors": True}

    return arguments


@pytest.fixture(scope="module")
def two_loras(exported) -> Callable[[str], nn.Module]:
    """The same, by diffusers' own loading of exported LoRAs."""
    models = {component: MODELS[component][0]() for component in MODELS}
    for component, model in models.items():
        for name in ("fine", "style"):
            model.load_lora_adapter(**exported(component, name))
        model.set_adapters(["fine", "style"])
    return lambda component: copy.deepcopy(models[component])


BLOCKS = {"down": 0.3, "mid": -0.5, "up": {"block_0": [0.2, 0.9]}}
CALLS = {
    "weights": [
        ("set_adapters", ["fine", "style"], [0.5, -2.0]),
        ("set_adapters", "style", 0.1),
        ("set_adapters", ["style", "fine"]),
    ],
    "one adapter": [("set_adapter", "fine"), ("set_adapter", "style"), ("set_adapter", ["fine", "style"])],
    "off and on": [("disable_lora",), ("enable_lora",), ("disable_adapters",), ("enable_adapters",)],
    "delete": [("delete_adapters", "fine"), ("delete_adapters", ["style"])],
    "delete and set": [("delete_adapters", "style"), ("set_adapters", "fine", 0.6)],
    "fuse": [("fuse_lora",), ("unfuse_lora",), ("fuse_lora", 1.0, True), ("unfuse_lora",)],
    "fuse by a scale": [("fuse_lora", 0.5), ("unfuse_lora",)],
    "fuse one": [("fuse_lora", 1.0, False, ["style"]), ("unfuse_lora",)],
    "fuse and unload": [("fuse_lora",), ("unload_lora",)],
    "unload": [("unload_lora",)],
}


class TestMethods:
    @pytest.mark.parametrize("calls", CALLS)
    def test_do_what_they_do_with_lora(self, component, calls, two_loras):
        wara, lora = two(component), two_loras(component)
        before = output(component, wara)
        assert (before - output(component, MODELS[component][0]())).norm() > 0.01 * before.norm()
        torch.testing.assert_close(before, output(component, lora), **CLOSE)
        for name, *arguments in CALLS[calls]:
            for model in (wara, lora):
                getattr(model, name)(*arguments)
            torch.testing.assert_close(output(component, wara), output(component, lora), **CLOSE)
            if getattr(lora, "peft_config", None):
                assert wara.active_adapters() == lora.active_adapters()
                assert wara.peft_config.keys() == lora.peft_config.keys()

    def test_weights_by_block(self, exported):
        """Which diffusers gives to attention alone, of LoRAs too."""
        wara, lora = unet(), unet()
        add_copy(wara, two("unet"), "style", "style")
        lora.load_lora_adapter(**exported("unet", "style"))
        at_one = output("unet", wara)
        for model in (wara, lora):
            model.set_adapters("style", BLOCKS)
        assert (output("unet", wara) - at_one).norm() > 0.01 * at_one.norm()
        torch.testing.assert_close(output("unet", wara), output("unet", lora), **CLOSE)

    def test_an_unloaded_model_is_as_it_was(self, component):
        make, _ = MODELS[component]
        model = two(component)
        model.unload_lora()
        before, after = make().state_dict(), model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        model.add_adapter(config(["to_q"]), "c")
        assert list(model.peft_config) == ["c"]

    def test_adapters_may_come_again(self, component):
        model = two(component)
        wanted = output(component, model)
        weights = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("fine", "style")}
        weights = {name: {key: value.clone() for key, value in of.items()} for name, of in weights.items()}
        configs = dict(model.peft_config)
        model.delete_adapters(["fine", "style"])
        assert torch.equal(output(component, model), output(component, MODELS[component][0]()))
        for name, of_adapter in weights.items():
            model.add_adapter(configs[name], name)
            set_peft_model_state_dict(model, of_adapter, adapter_name=name)
        model.set_adapters(["fine", "style"])
        torch.testing.assert_close(output(component, model), wanted)

    def test_training(self, component):
        make, targets = MODELS[component]
        model = make().requires_grad_(False)
        model.add_adapter(WaRAConfig(target_modules=targets, r=2))
        before = output(component, model)
        assert torch.equal(before, output(component, make()))
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        assert trained and all(".wara_" in name for name in trained)
        with torch.enable_grad():
            generator = torch.Generator().manual_seed(0)
            image, text = (torch.randn(size, generator=generator) for size in ((1, 4, 8, 8), (1, 5, WIDTH)))
            more = {"pooled_projections": torch.zeros(1, WIDTH)} if component == "transformer" else {}

            def loss() -> Tensor:
                return (
                    model(image, encoder_hidden_states=text, timestep=torch.tensor([5]), **more).sample.square().mean()
                )

            descend(loss, trained.values())
        base = make().state_dict()
        kept = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        assert all(torch.equal(kept[name], value) for name, value in base.items())


class TestPipeline:
    """What a pipeline does with components that have WaRA adapters."""

    def test_scale_of_a_call(self, tmp_path):
        tiny = TINY["unet and text encoder"]
        wara, lora = tiny.pipeline(**adapted(tiny)), tiny.pipeline(**tiny.models())
        save_as_lora(tmp_path, {"unet": wara.unet, "text_encoder": wara.text_encoder}, format="diffusers")
        lora.load_lora_weights(tmp_path)
        at_one = tiny.sample(wara)
        for scale in (0.3, 0.0):
            scaled = [tiny.sample(each, cross_attention_kwargs={"scale": scale}) for each in (wara, lora)]
            assert (scaled[0] - at_one).norm() > 0.05 * at_one.norm()
            torch.testing.assert_close(*scaled, **CLOSE)
            torch.testing.assert_close(tiny.sample(wara), at_one)

    def test_its_own_methods(self):
        tiny = TINY["unet and text encoder"]
        pipeline = tiny.pipeline(**adapted(tiny, "wara"))
        wanted, without = tiny.sample(pipeline), tiny.sample(tiny.pipeline(**tiny.models()))
        assert pipeline.get_active_adapters() == ["wara"]
        pipeline.fuse_lora()
        assert pipeline.fused_loras == {"wara"}
        torch.testing.assert_close(tiny.sample(pipeline), wanted, **CLOSE)
        pipeline.unfuse_lora()
        pipeline.set_adapters("wara", {"unet": 0.0, "text_encoder": 0.0})
        torch.testing.assert_close(tiny.sample(pipeline), without, **CLOSE)
        pipeline.set_adapters("wara", 1.0)
        torch.testing.assert_close(tiny.sample(pipeline), wanted, **CLOSE)
        pipeline.unload_lora_weights()
        torch.testing.assert_close(tiny.sample(pipeline), without, **CLOSE)

    def test_factors_are_kept_over_the_steps(self):
        tiny = TINY["SD3"]
        models = adapted(tiny)
        pipeline = tiny.pipeline(**models)
        wanted = tiny.sample(pipeline, num_inference_steps=3)
        with torch.inference_mode(), frozen_factors(models["transformer"]):
            assert torch.equal(tiny.sample(pipeline, num_inference_steps=3), wanted)

    def test_what_it_cannot_do(self):
        """As docs/works_with.md says."""
        tiny = TINY["SD3"]
        pipeline = tiny.pipeline(**adapted(tiny))
        with pytest.raises(AttributeError, match="has no attribute 'lora_A'"):
            pipeline.set_lora_device(["default"], "cpu")
        with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
            convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.transformer))


class TestBesideLora:
    """A LoRA on layers that have a WaRA adapter, convolutions too, and the reverse."""

    @pytest.mark.parametrize("first", ["wara", "lora"])
    def test_they_add_up(self, component, first, exported, two_loras):
        wanted = two(component)
        if first == "wara":
            both = two(component)
            both.delete_adapters("fine")
            both.load_lora_adapter(**exported(component, "fine"))
        else:
            both = two_loras(component)
            both.delete_adapters("style")
            add_copy(both, wanted, "style", "style")
        for model in (both, wanted):
            model.set_adapters(["fine", "style"], [0.5, -2.0])
        expected = output(component, wanted)
        torch.testing.assert_close(output(component, both), expected, **CLOSE)
        both.fuse_lora()
        torch.testing.assert_close(output(component, both), expected, **CLOSE)
        both.unload_lora()
        assert not any(isinstance(module, BaseTunerLayer) for module in both.modules())
        torch.testing.assert_close(output(component, both), expected, **CLOSE)

    def test_on_convolutions(self, exported):
        """Which PEFT's LoRA asks for their groups."""
        model, wanted = unet(), two("unet")
        add_copy(model, wanted, "fine", "other")
        model.load_lora_adapter(**exported("unet", "fine"))
        assert isinstance(model.conv_in.base_layer.base_layer, nn.Conv2d)
        model.set_adapters(["fine", "other"], [0.25, 0.75])
        wanted.set_adapters("fine")
        torch.testing.assert_close(output("unet", model), output("unet", wanted), **CLOSE)

    def test_hotswap_is_refused(self, exported):
        model = two("transformer")
        with pytest.raises(ValueError, match="Incompatible PEFT types found: WARA and LORA"):
            model.load_lora_adapter(**exported("transformer", "fine"), hotswap=True)


def add_copy(model: nn.Module, source: nn.Module, name: str, new_name: str) -> None:
    """Add another model's adapter to a model, as a training script goes on with one."""
    model.add_adapter(source.peft_config[name], new_name)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source, adapter_name=name), adapter_name=new_name)


class TestSaving:
    """diffusers saves WaRA's own tensors under LoRA's file name, which it cannot load; this package reads the file."""

    def test_save_lora_adapter(self, component, tmp_path):
        model = two(component)
        model.save_lora_adapter(tmp_path / "saved", adapter_name="fine")
        assert SavedAdapter(tmp_path / "saved").config.wavelet == "db2"
        arguments = ["export", tmp_path / "saved", tmp_path / "lora", "--format", "diffusers"]
        result = say(*arguments)
        assert result.exit_code == 1
        assert (
            "a model that its config does not name, by which the component of the pipeline cannot be" in result.stderr
        )
        result = say(*arguments, "--component", component)
        assert result.exit_code == 0, result.stderr
        save_as_lora(tmp_path / "of_model", model, adapter_name="fine", format="diffusers")
        found, wanted = read(tmp_path / "lora")[0], read(tmp_path / "of_model")[0]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())

    def test_goes_on_training(self, component, tmp_path):
        model, other = two(component), MODELS[component][0]()
        model.save_lora_adapter(tmp_path, adapter_name="fine")
        other.add_adapter(SavedAdapter(tmp_path).config)
        result = set_peft_model_state_dict(other, load_file(tmp_path / FILE))
        assert result.unexpected_keys == []
        model.set_adapter("fine")
        torch.testing.assert_close(output(component, other), output(component, model))

    def test_a_training_script(self, tmp_path):
        """Which saves the tensors of several components by the pipeline, with their configs."""
        tiny = TINY["unet and text encoder"]
        models = adapted(tiny)
        layers = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in models.items()}
        StableDiffusionPipeline.save_lora_weights(tmp_path / "saved", **layers, **_collate_lora_metadata(models))
        result = say("export", tmp_path / "saved", tmp_path / "lora")
        assert result.exit_code == 1
        assert "holds adapters of 'text_encoder' and 'unet'. Name the one to read" in result.stderr
        both = ("--component", "unet", "--component", "text_encoder")
        result = say(
            "export", tmp_path / "saved", tmp_path / "saved", tmp_path / "lora", "--format", "diffusers", *both
        )
        assert result.exit_code == 0, result.stderr
        save_as_lora(tmp_path / "of_model", models, format="diffusers")
        found, wanted = read(tmp_path / "lora")[0], read(tmp_path / "of_model")[0]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())

    def test_one_component_says_which(self, tmp_path):
        model = two("transformer")
        saved = {
            f"transformer.{key}": value.clone()
            for key, value in get_peft_model_state_dict(model, adapter_name="fine").items()
        }
        fields = {f"transformer.{key}": value for key, value in model.peft_config["fine"].to_dict().items()}
        fields["transformer.target_modules"] = None
        tmp_path.joinpath("saved").mkdir()
        save_file(saved, tmp_path / "saved" / FILE, {"lora_adapter_metadata": json.dumps(fields)})
        save_as_lora(tmp_path / "lora", tmp_path / "saved", format="diffusers")
        assert {key.partition(".")[0] for key in read(tmp_path / "lora")[0]} == {"transformer"}

    def test_diffusers_does_not_load_it(self, tmp_path, caplog, monkeypatch):
        """As docs/works_with.md says: it takes the file for a LoRA, and complains, or says that there is none."""
        two("transformer").save_lora_adapter(tmp_path, adapter_name="fine")
        model = sd3_transformer()
        with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
            model.load_lora_adapter(tmp_path / FILE, prefix=None, use_safetensors=True)
        monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
        with caplog.at_level(logging.WARNING, "diffusers"):
            model.load_lora_adapter(tmp_path / FILE, use_safetensors=True)
        assert "No LoRA keys associated to SD3Transformer2DModel" in caplog.text
        with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
            TINY["SD3"].pipeline(transformer=model).load_lora_weights(tmp_path)
        assert torch.equal(output("transformer", model), output("transformer", sd3_transformer()))


class TestBadFiles:
    """A sentence, and nothing is written."""

    @pytest.mark.parametrize(
        ("metadata", "said"),
        [
            (None, "has no config of an adapter in its metadata"),
            ({}, "has no config of an adapter in its metadata"),
            ({"lora_adapter_metadata": "{"}, "has no config of an adapter in its metadata"),
            ({"lora_adapter_metadata": "[" * 10**5}, "has no config of an adapter in its metadata"),
            ({"lora_adapter_metadata": "[]"}, "is not a JSON object"),
            ({"lora_adapter_metadata": "{}"}, "holds adapters of none"),
            ({"lora_adapter_metadata": '{"peft_type": "LORA"}'}, "is not of a WaRA adapter: its peft_type is 'LORA'"),
            ({"lora_adapter_metadata": '{"unet.peft_type": "WARA"}'}, "module_shapes in .* is empty"),
            ({"lora_adapter_metadata": '{"vae.peft_type": "WARA"}'}, "holds adapters of 'vae', not of 'unet'"),
        ],
    )
    def test_refused(self, metadata, said, tmp_path):
        (tmp_path / "saved").mkdir()
        save_file({"unet.conv_in.wara_A.level1": torch.ones(2, 2)}, tmp_path / "saved" / FILE, metadata)
        component = None if said.startswith("holds adapters of none") else "unet"
        with pytest.raises(ValueError, match=said):
            save_as_lora(tmp_path / "lora", tmp_path / "saved", format="diffusers", component=component)
        assert not (tmp_path / "lora").exists()

    def test_tensors_that_the_config_does_not_ask_for(self, tmp_path):
        model = two("transformer")
        model.save_lora_adapter(tmp_path, adapter_name="fine")
        tensors = load_file(tmp_path / FILE)
        fields = json.dumps({**model.peft_config["fine"].to_dict(), "target_modules": None})
        metadata = {"lora_adapter_metadata": fields}
        key = next(iter(tensors))
        save_file({name: value for name, value in tensors.items() if name != key}, tmp_path / FILE, metadata)
        with pytest.raises(ValueError, match=f"lacks '{key}', which its config asks for"):
            SavedAdapter(tmp_path)
        save_file({**tensors, key: tensors[key][:1]}, tmp_path / FILE, metadata)
        with pytest.raises(ValueError, match=f"has '{key}' of shape"):
            SavedAdapter(tmp_path)
