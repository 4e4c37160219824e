"""WaRA adapters in diffusion pipelines: exported, diffusers' own loaders compute what the WaRA models compute."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tests.diffusion_models import TINY, Tiny, flux_transformer, sd3_transformer, text_encoder, unet
from wara_peft import WaRAConfig, save_as_lora, to_lora
from wara_peft.layers.base import WaRALayer
from wara_peft_cli.app import app

pytestmark = [
    pytest.mark.filterwarnings("ignore:levels=. is more than is useful:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
"""For sums in another order in float32: of weights that are merged, or of products that are scaled before."""


def config(targets: object, **fields: object) -> WaRAConfig:
    return WaRAConfig(target_modules=targets, init_weights=False, **{"r": 2, "wara_alpha": 5, **fields})


def adapted(tiny: Tiny, name: str = "default", **fields: object) -> dict[str, nn.Module]:
    """The components, each with an adapter of that name, as diffusers and transformers add it."""
    models = tiny.models()
    for component, model in models.items():
        model.add_adapter(config(tiny.targets[component], **fields), name)
    return models


def with_deltas(tiny: Tiny, *weighted: tuple[dict[str, nn.Module], str, float]) -> dict[str, nn.Module]:
    """The components without adapters, their weights with the sum of adapters' dense updates, times factors."""
    models = tiny.models()
    for adapters, name, factor in weighted:
        for component, model in adapters.items():
            for path, layer in model.named_modules():
                if isinstance(layer, WaRALayer):
                    models[component].get_submodule(path).weight.data.add_(layer.get_delta_weight(name), alpha=factor)
    return models


class Case(NamedTuple):
    tiny: Tiny
    adapted: dict[str, nn.Module]
    wanted: Tensor
    without: Tensor
    lora: Path

    def loaded(self) -> DiffusionPipeline:
        pipeline = self.tiny.pipeline(**self.tiny.models())
        pipeline.load_lora_weights(self.lora, adapter_name="wara")
        return pipeline


@pytest.fixture(scope="module", params=TINY)
def case(request, tmp_path_factory) -> Case:
    """A pipeline, its components with WaRA adapters, what it computes with and without them, and the export."""
    tiny, lora = TINY[request.param], tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    models = adapted(tiny, levels=2, wavelet="db2")
    wanted, without = (tiny.sample(tiny.pipeline(**each)) for each in (models, tiny.models()))
    assert (wanted - without).norm() > 0.01 * without.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_as_lora(lora, models, format="diffusers")
    return Case(tiny, models, wanted, without, lora)


class TestPipelines:
    """A UNet with convolutions, two diffusion transformers and a text encoder."""

    def test_load(self, case):
        pipeline = case.loaded()
        assert pipeline.get_list_adapters() == {component: ["wara"] for component in case.adapted}
        torch.testing.assert_close(case.tiny.sample(pipeline), case.wanted, **CLOSE)

    def test_is_what_dense_updates_give(self, case):
        models = with_deltas(case.tiny, (case.adapted, "default", 1.0))
        torch.testing.assert_close(case.tiny.sample(case.tiny.pipeline(**models)), case.wanted, **CLOSE)

    def test_fuse_unfuse_unload(self, case):
        pipeline = case.loaded()
        pipeline.fuse_lora(components=list(case.adapted))
        assert pipeline.fused_loras == {"wara"}
        torch.testing.assert_close(case.tiny.sample(pipeline), case.wanted, **CLOSE)
        pipeline.unfuse_lora(components=list(case.adapted))
        torch.testing.assert_close(case.tiny.sample(pipeline), case.wanted, **CLOSE)
        pipeline.unload_lora_weights()
        assert not any("lora" in name for component in case.adapted for name, _ in _tensors(pipeline, component))
        torch.testing.assert_close(case.tiny.sample(pipeline), case.without, **CLOSE)

    def test_unload_leaves_every_bit(self, case):
        """The weights are equal to the bit, and so are results once the fresh weights are frozen too."""
        pipeline = case.loaded()
        pipeline.unload_lora_weights()
        fresh = {name: model.requires_grad_(False) for name, model in case.tiny.models().items()}
        for component, model in fresh.items():
            found = getattr(pipeline, component).state_dict()
            assert found.keys() == model.state_dict().keys()
            assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
        assert torch.equal(case.tiny.sample(pipeline), case.tiny.sample(case.tiny.pipeline(**fresh)))

    def test_weights_of_two(self, case, tmp_path):
        other = adapted(case.tiny, "style", form="shared", r=3)
        save_as_lora(tmp_path, other, adapter_name="style", format="diffusers")
        pipeline = case.loaded()
        pipeline.load_lora_weights(tmp_path, adapter_name="style")
        pipeline.set_adapters(["wara", "style"], [0.7, -0.4])
        both = (case.adapted, "default", 0.7), (other, "style", -0.4)
        wanted = case.tiny.sample(case.tiny.pipeline(**with_deltas(case.tiny, *both)))
        assert (wanted - case.wanted).norm() > 0.01 * case.wanted.norm()
        torch.testing.assert_close(case.tiny.sample(pipeline), wanted, **CLOSE)

    def test_from_directories(self, case, tmp_path):
        """By the command; which component each is of, the adapters' configs say."""
        for component, model in case.tiny.models().items():
            torch.manual_seed(1)
            get_peft_model(model, config(case.tiny.targets[component])).save_pretrained(tmp_path / component)
        directories = [tmp_path / component for component in case.adapted]
        result = say("export", *directories, tmp_path / "lora", "--format", "diffusers")
        assert result.exit_code == 0, result.stderr
        for component in case.adapted:
            assert f" modules of {component}.\nIt is exact.\n" in result.stdout
        assert "vLLM" not in result.stdout
        models = case.tiny.models()
        for component, model in models.items():
            torch.manual_seed(1)
            model.add_adapter(config(case.tiny.targets[component]))
        pipeline = case.tiny.pipeline(**case.tiny.models())
        pipeline.load_lora_weights(tmp_path / "lora")
        wanted = case.tiny.sample(case.tiny.pipeline(**models))
        torch.testing.assert_close(case.tiny.sample(pipeline), wanted, **CLOSE)


def _tensors(pipeline: DiffusionPipeline, component: str) -> list[tuple[str, Tensor]]:
    return list(getattr(pipeline, component).state_dict().items())


def say(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="wara-peft", env={"COLUMNS": "400"})


def read(directory: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors of a file of diffusers, and its metadata."""
    assert [path.name for path in directory.iterdir()] == [LORA_WEIGHT_NAME_SAFE]
    with safe_open(directory / LORA_WEIGHT_NAME_SAFE, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
        return tensors, json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])


class TestFile:
    def test_keys_and_values(self, tmp_path):
        models = {"unet": unet(), "text_encoder": text_encoder()}
        models["unet"].add_adapter(config(["to_q", "conv_in"]))
        models["text_encoder"].add_adapter(config(["q_proj", "fc1"]))
        save_as_lora(tmp_path, models, format="diffusers")
        tensors, metadata = read(tmp_path)
        expected = {}
        for component, names in (("unet", ("lora_A", "lora_B")), ("text_encoder", ("down", "up"))):
            lora_config, state_dict = to_lora_quietly(models[component])
            for key, value in state_dict.items():
                key = key.removeprefix("base_model.model.")
                if component == "text_encoder":
                    for side, direction in zip(("lora_A", "lora_B"), names, strict=True):
                        key = key.replace(side, f"lora_linear_layer.{direction}")
                expected[f"{component}.{key}"] = value
            prefix = f"{component}."
            of_component = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
            assert (of_component["r"], of_component["lora_alpha"], of_component["peft_type"]) == (8, 8, "LORA")
            assert LoraConfig(**of_component).target_modules == lora_config.target_modules
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected.items())
        assert {key.partition(".")[0] for key in metadata} == {"unet", "text_encoder"}

    def test_rank_and_dtype(self, tmp_path):
        model = sd3_transformer()
        model.add_adapter(config(["to_q", "to_k"]))
        save_as_lora(tmp_path, model, rank=3, dtype=torch.bfloat16, format="diffusers")
        tensors, metadata = read(tmp_path)
        assert metadata["transformer.r"] == 3
        expected = to_lora(model, rank=3, dtype=torch.bfloat16)[1]
        assert len(tensors) == len(expected) == 8
        for key, value in expected.items():
            assert torch.equal(tensors[key.replace("base_model.model.", "transformer.")], value)

    def test_a_component_may_be_named(self, tmp_path):
        """Where the class says less than the caller knows, also of a saved adapter with no class on record."""
        torch.manual_seed(0)
        model = CLIPTextModelWithProjection(text_encoder().config)
        model.add_adapter(config(["fc1"]))
        save_as_lora(tmp_path / "lora", model, format="diffusers", component="text_encoder_2")
        assert {key.partition(".")[0] for key in read(tmp_path / "lora")[0]} == {"text_encoder_2"}
        model.save_pretrained(tmp_path / "wara")
        out = tmp_path / "other"
        result = say("export", tmp_path / "wara", out, "--format", "diffusers", "--component", "text_encoder_2")
        assert result.exit_code == 0, result.stderr
        named, by_model = read(out)[0], read(tmp_path / "lora")[0]
        assert named.keys() == by_model.keys() and all(torch.equal(named[key], by_model[key]) for key in named)

    def test_layers_beyond_attention(self, tmp_path):
        """diffusers' own converter leaves them under keys that its loader cannot tell, if there is no attention."""
        tiny = TINY["unet and text encoder"]
        models = tiny.models()
        models["text_encoder"].add_adapter(config(["fc1", "token_embedding"]))
        wanted = tiny.sample(tiny.pipeline(**models))
        save_as_lora(tmp_path, models["text_encoder"], format="diffusers")
        pipeline = tiny.pipeline(**tiny.models())
        pipeline.load_lora_weights(tmp_path)
        assert (tiny.sample(tiny.pipeline(**tiny.models())) - wanted).abs().max() > 1e-2
        torch.testing.assert_close(tiny.sample(pipeline), wanted, **CLOSE)

    def test_another_run_updates_the_directory(self, tmp_path):
        model = flux_transformer()
        model.add_adapter(config(["to_q"]))
        (tmp_path / "README.md").write_text("mine")
        for rank in (2, 1):
            save_as_lora(tmp_path, model, rank=rank, format="diffusers")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", LORA_WEIGHT_NAME_SAFE]
        assert (tmp_path / "README.md").read_text() == "mine"


def to_lora_quietly(model: nn.Module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return to_lora(model)


class Both(nn.Module):
    """Components under one roof."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet(), text_encoder()


def _llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))


def _clip() -> CLIPModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text_encoder().config.to_dict(), vision_config=vision))


def _wrapped(model: nn.Module, *targets: str, **fields: object) -> nn.Module:
    return get_peft_model(model, WaRAConfig(target_modules=list(targets), r=1, **fields))


# what makes the adapter, component, what is said
REFUSED = {
    "a class that is no component": (lambda: _wrapped(nn.Sequential(nn.Linear(4, 4)), "0"), None, "of Sequential, by"),
    "one of two text encoders": (
        lambda: _wrapped(CLIPTextModelWithProjection(text_encoder().config), "fc1"),
        None,
        "of CLIPTextModelWithProjection, by which the component of the pipeline cannot be told. Name it",
    ),
    "no such component": (lambda: _wrapped(unet(), "to_q"), "nuet", "'nuet' is none .* those are .*text_encoder, "),
    "no text encoder": (
        lambda: _wrapped(unet(), "to_q"),
        "text_encoder",
        "'text_encoder' was named, but the adapter is of UNet2DConditionModel, which is a unet",
    ),
    "no UNet": (lambda: _wrapped(text_encoder(), "fc1"), "unet", "of CLIPTextModel, which is a text_encoder"),
    "no transformer": (lambda: _wrapped(unet(), "to_q"), "transformer", "was named, but .* a unet"),
    "the second of Wan's": (
        lambda: _wrapped(sd3_transformer(), "to_q"),
        "transformer_2",
        r"Give component='transformer', and load with load_lora_weights\(\.\.\., load_into_transformer_2=True\)",
    ),
    "a language model": (lambda: _wrapped(_llama(), "q_proj"), None, "of LlamaForCausalLM, a model with a head"),
    "a language model's task": (
        lambda: _wrapped(_llama(), "q_proj", task_type="CAUSAL_LM"),
        "text_encoder",
        "trained for the task CAUSAL_LM",
    ),
    "several components in one": (
        lambda: _wrapped(Both(), "to_q", "fc1"),
        "unet",
        "has modules of 'text_encoder' and 'unet', which",
    ),
    "text and images in one": (
        lambda: _wrapped(_clip(), "fc1"),
        "text_encoder",
        r"has modules that see images \('vision_model\.encoder\.layers\.0\.mlp\.fc1'\)",
    ),
    "weights in full": (
        lambda: _wrapped(unet(), "to_q", modules_to_save=["conv_out"]),
        None,
        r"holds in full \('conv_out\.",
    ),
    "biases": (lambda: _wrapped(unet(), "to_out.0", bias="wara_only"), "unet", r"not what this adapter holds in full"),
    "embeddings alone": (
        lambda: _wrapped(text_encoder(), "token_embedding"),
        None,
        "not of linear layers too, and this one is of 'embeddings.token_embedding'",
    ),
}


class TestBadInput:
    """A sentence, and nothing is written."""

    @pytest.mark.parametrize("refused", REFUSED)
    @pytest.mark.parametrize("saved", [False, True])
    def test_refused(self, refused, saved, tmp_path):
        make, component, said = REFUSED[refused]
        source = make()
        if saved:
            source.save_pretrained(tmp_path / "wara")
            source = tmp_path / "wara"
        with pytest.raises(ValueError, match=said):
            save_as_lora(tmp_path / "lora", source, format="diffusers", component=component)
        if saved:
            named = () if component is None else ("--component", component)
            result = say("export", source, tmp_path / "lora", "--format", "diffusers", *named)
            assert result.exit_code == 1
            assert not result.stdout
        assert not (tmp_path / "lora").exists()

    def test_no_class_on_record(self, tmp_path):
        model = text_encoder()
        model.add_adapter(config(["fc1"]))
        model.save_pretrained(tmp_path / "wara")
        with pytest.raises(ValueError, match="of a model that its config does not name, by which the component"):
            save_as_lora(tmp_path / "lora", tmp_path / "wara", format="diffusers")

    def test_components_of_no_one_pipeline(self, tmp_path):
        models = {"unet": _wrapped(unet(), "to_q"), "transformer": _wrapped(flux_transformer(), "to_q")}
        with pytest.raises(ValueError, match="No pipeline of diffusers loads LoRAs into 'transformer' and 'unet' tog"):
            save_as_lora(tmp_path / "lora", models, format="diffusers")
        assert not (tmp_path / "lora").exists()

    def test_a_component_twice(self, tmp_path):
        for name in ("a", "b"):
            _wrapped(unet(), "to_q").save_pretrained(tmp_path / name)
        result = say("export", tmp_path / "a", tmp_path / "b", tmp_path / "lora", "--format", "diffusers")
        assert result.exit_code == 1
        assert "Two adapters are of the component 'unet'" in result.stderr
        assert not (tmp_path / "lora").exists()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"format": "kohya"}, "format='kohya' must be one of 'peft', 'diffusers'"),
            ({"component": "unet"}, "component='unet' has no meaning with format='peft'"),
        ],
    )
    def test_options(self, options, said, tmp_path):
        with pytest.raises(ValueError, match=said):
            save_as_lora(tmp_path / "lora", _wrapped(unet(), "to_q"), **options)
        assert not (tmp_path / "lora").exists()

    def test_several_in_peft_format(self, tmp_path):
        with pytest.raises(ValueError, match="Several models, by component, are for format='diffusers'"):
            save_as_lora(tmp_path / "lora", {"unet": _wrapped(unet(), "to_q")})

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["a", "b", "lora"], "several adapters, and --component, are for --format diffusers"),
            (["a", "lora", "--component", "unet"], "several adapters, and --component, are for --format diffusers"),
            (
                ["a", "b", "lora", "--format", "diffusers", "--component", "unet"],
                "give --component once for each of the 2 adapters",
            ),
        ],
    )
    def test_misuse_of_the_command(self, arguments, said):
        result = say("export", *arguments)
        assert result.exit_code == 2
        assert said in result.stderr

    def test_without_diffusers(self, tmp_path, monkeypatch):
        model = _wrapped(unet(), "to_q")
        monkeypatch.setitem(sys.modules, "diffusers.loaders.lora_base", None)
        with pytest.raises(ImportError, match="format='diffusers' needs diffusers: pip install diffusers"):
            save_as_lora(tmp_path / "lora", model, format="diffusers")
        assert not (tmp_path / "lora").exists()
        save_as_lora(tmp_path / "lora", model)
