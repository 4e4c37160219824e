"""LoRAs for one engine: experts under the names that it reads, and what it does not take is refused."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.layers.test_parameters import adapted, deepseek, gpt_oss, llama4, logits, mixtral, qwen3_moe
from wara_peft import WaRAConfig, save_as_lora, to_lora
from wara_peft.lora.engines import ENGINES, VLLM_RANKS

NAMES = {mixtral: ("w1", "w3", "w2"), qwen3_moe: ("gate_proj", "up_proj", "down_proj"), deepseek: None}
# What vLLM and SGLang find in a key: the layer, the expert, the projection, and which factor it is.
KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.lora_(A|B)\.weight"
)
ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


def in_float64(make):
    model = make().double()
    model.set_experts_implementation("eager")
    return model


def updates(folder) -> dict[tuple[int, int, str], torch.Tensor]:
    """ΔW of each layer, expert and role, from a file with one LoRA each."""
    factors: dict[tuple, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        if ".experts." in key:
            layer, expert, name, side = KEY.fullmatch(key).groups()
            factors.setdefault((int(layer), int(expert), ROLES[name]), {})[side] = value
    return {place: pair["B"] @ pair["A"] for place, pair in factors.items()}


def weights(model) -> dict[tuple[int, int, str], torch.Tensor]:
    """Each expert's matrices, cut out of the stacks by transformers' own definition of an expert's forward."""
    found = {}
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            experts = layer.mlp.experts
            for expert in range(len(experts.down_proj)):
                gate, up = experts.gate_up_proj[expert].detach().chunk(2)
                down = experts.down_proj[expert].detach()
                roles = {"gate": gate, "up": up, "down": down}
                found |= {(number, expert, role): weight.clone() for role, weight in roles.items()}
    return found


@pytest.mark.parametrize("make", NAMES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_each_expert_has_the_change_that_merging_makes(tmp_path, make, engine):
    model = adapted(in_float64(make), r=2, wavelet="db2", levels=1)
    save_as_lora(tmp_path / "lora", model, engine=engine)
    before = weights(in_float64(make))
    merged = weights(model.merge_and_unload())
    found = updates(tmp_path / "lora")
    assert found.keys() == merged.keys()
    for place, weight in merged.items():
        change = weight - before[place]
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(found[place], change, atol=1e-12, rtol=1e-10)


def test_names_are_those_of_the_base_models_files(tmp_path):
    """Of all projections, though gate and up are not adapted: vLLM asks for the three of each expert."""
    for make, names in ((mixtral, NAMES[mixtral]), (qwen3_moe, NAMES[qwen3_moe])):
        make().save_pretrained(tmp_path / "base")
        files = {key.removesuffix(".weight") for key in load_file(tmp_path / "base" / "model.safetensors")}
        config = WaRAConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"], r=2)
        save_as_lora(tmp_path / make.__name__, adapted(make(), config), engine="vllm")
        state = load_file(tmp_path / make.__name__ / "adapter_model.safetensors")
        modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in state}
        assert modules <= files and {name for name in files if ".experts." in name} <= modules
        assert {name.rpartition(".")[2] for name in modules} == {"q_proj", *names}
        assert len(modules) == 2 * (1 + 3 * 4)
        for key, value in state.items():
            if ".experts." in key:
                assert bool(value.any()) == (key.split(".")[-3] == names[2])
        for layer in (0, 1):
            for name in names[:2]:
                key = f"{'block_sparse_moe' if make is mixtral else 'mlp'}.experts.0.{name}"
                rows, columns = load_file(tmp_path / "base" / "model.safetensors")[
                    f"model.layers.{layer}.{key}.weight"
                ].shape
                place = f"base_model.model.model.layers.{layer}.{key}"
                assert state[f"{place}.lora_A.weight"].shape == (8, columns)
                assert state[f"{place}.lora_B.weight"].shape == (rows, 8)


def test_a_saved_adapter_asks_its_base_for_the_names(tmp_path):
    model = adapted(qwen3_moe())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"names no base model: give base=DIRECTORY \(--base"):
        save_as_lora(tmp_path / "lora", tmp_path / "adapter", engine="vllm")
    # the base that was given is not what the config names
    with pytest.raises(FileNotFoundError, match=r"There is no model directory '.*nowhere'"):
        save_as_lora(tmp_path / "lora", tmp_path / "adapter", engine="vllm", base=tmp_path / "nowhere")
    assert not (tmp_path / "lora").exists()
    qwen3_moe().save_pretrained(tmp_path / "base")
    save_as_lora(tmp_path / "lora", tmp_path / "adapter", engine="vllm", base=tmp_path / "base")
    save_as_lora(tmp_path / "again", model, engine="vllm")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "again"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_peft_loads_experts_apart(tmp_path):
    model = adapted(mixtral())
    save_as_lora(tmp_path / "lora", model, engine="vllm")
    loaded = PeftModel.from_pretrained(mixtral(), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(loaded), logits(mixtral()), atol=1e-2)


@pytest.mark.parametrize("make", [gpt_oss, llama4], ids=lambda make: make.__name__)
def test_models_whose_files_keep_experts_stacked_have_no_names_for_each(tmp_path, make):
    message = r"The files of (gpt_oss|llama4_text) models have '.*experts\.gate_up_proj' as .*, with experts stacked"
    with pytest.raises(ValueError, match=message):
        save_as_lora(tmp_path / "lora", adapted(make()), engine="sglang")
    assert not (tmp_path / "lora").exists()


def test_stacked_experts_as_vllm_reads_them(tmp_path):
    """vLLM takes the inner of two LoRAs around experts for gate_up_proj's, and the outer one for down_proj's."""
    model = adapted(gpt_oss())
    save_as_lora(tmp_path / "lora", model, engine="vllm-3d")
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="engines that serve LoRA take adapters of linear layers alone"):
        _, stacked = to_lora(model)
    assert found.keys() == stacked.keys()
    assert all(torch.equal(value, stacked[key]) for key, value in found.items())
    hidden, intermediate = model.config.hidden_size, model.config.intermediate_size
    for layer in (0, 1):
        experts = f"base_model.model.model.layers.{layer}.mlp.experts"
        assert found[f"{experts}.base_layer.lora_A.weight"].shape == (4 * 8, hidden)
        assert found[f"{experts}.base_layer.lora_B.weight"].shape == (2 * intermediate, 8 * 4)
        assert found[f"{experts}.lora_A.weight"].shape == (4 * 8, intermediate)
        assert found[f"{experts}.lora_B.weight"].shape == (hidden, 8 * 4)


def test_stacks_come_in_pairs_for_vllm(tmp_path):
    model = adapted(gpt_oss(), WaRAConfig(target_modules=[], target_parameters=["experts.down_proj"], r=2))
    with pytest.raises(
        ValueError, match=r"in pairs, gate_up_proj and down_proj.*layers\.0\.mlp\.experts'.*Train both"
    ):
        save_as_lora(tmp_path / "lora", model, engine="vllm-3d")


def with_parts(**fields) -> PeftModel:
    return get_peft_model(mixtral(), WaRAConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}))


@pytest.mark.parametrize("engine", ["vllm", "vllm-3d", "sglang"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, r"adapters of Embedding layers \('model\.embed_tokens'\)"),
        ({"modules_to_save": ["lm_head"]}, r"trained or saved in full \('lm_head\.weight'\)"),
        ({"trainable_token_indices": [1, 2]}, r"trained or saved in full \('model\.embed_tokens"),
    ],
)
def test_parts_that_engines_do_not_take(tmp_path, engine, fields, message):
    remedy = "Merge the adapter instead, train it without them, or export it for 'peft'"
    with pytest.raises(
        ValueError, match=rf"^{engine} takes adapters of linear layers and of experts.*{message}.*{remedy}"
    ):
        save_as_lora(tmp_path / "lora", with_parts(**fields), engine=engine)
    assert not (tmp_path / "lora").exists()
    save_as_lora(tmp_path / "lora", with_parts(**fields), engine="peft")


def test_ranks(tmp_path):
    model = with_parts(r=200)
    for given in ({}, {"rank": 513}):
        with pytest.raises(ValueError, match=r"vllm serves no LoRA of rank (800|513), and 512 at most: give rank=512"):
            save_as_lora(tmp_path / "lora", model, engine="vllm", **given)
    assert not (tmp_path / "lora").exists()
    save_as_lora(tmp_path / "lora", model, engine="sglang")
    save_as_lora(tmp_path / "lora", model, engine="vllm", rank=max(VLLM_RANKS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tgi"}, r"engine='tgi' must be one of 'peft', 'vllm', 'vllm-3d', 'sglang', 'llama\.cpp'"),
        ({"engine": "vllm", "format": "gguf"}, "format='gguf' does not fit engine='vllm', which reads 'peft'"),
        ({"engine": "llama.cpp"}, r"must be the name of a file that ends in '\.gguf'"),
        ({"engine": "vllm-3d", "base": "x"}, "base='x' does not fit format='peft'"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save_as_lora(tmp_path / "lora", with_parts(), **options)
    assert not any(tmp_path.iterdir())


def test_strict_is_what_every_engine_takes():
    """So it refuses experts, which llama.cpp has not, and what vLLM and SGLang refuse."""
    serving = {name: engine for name, engine in ENGINES.items() if not engine.takes_all}
    assert serving.keys() == {"vllm", "vllm-3d", "sglang", "llama.cpp"}
    assert any(engine.experts is None for engine in serving.values())
    to_lora(with_parts(), strict=True)
    for model in (adapted(mixtral()), with_parts(modules_to_save=["lm_head"])):
        with pytest.raises(ValueError, match="take adapters of linear layers alone"):
            to_lora(model, strict=True)
