"""Bare parameters, such as the weights of a mixture's experts, beside what PEFT's LoRA does with them."""

from __future__ import annotations

import copy
import json
import threading
import warnings

import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import wara_peft
from tests.references import dense_coefficients, inverse_transform, module_shapes
from wara_peft import WaRAConfig
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.inspection.saved_adapter import inspect_adapter
from wara_peft.layers.parameters import AdaptedModule, ParameterLayer
from wara_peft.training.components import keep_components

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def mixtral(**fields):
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **fields})
    ).eval()


def qwen3_moe(**fields):
    torch.manual_seed(0)
    fields = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, **fields}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **fields})).eval()


def gpt_oss():
    torch.manual_seed(0)
    fields = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_theta": 1e4}}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **fields)).eval()


def deepseek():
    torch.manual_seed(0)
    heads = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
    fields = {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, **heads, **experts}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **fields)).eval()


def llama4():
    torch.manual_seed(0)
    fields = {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **fields)).eval()


def in_double(make):
    """In float64, for which grouped products have no kernel."""
    model = make().double()
    model.set_experts_implementation("eager")
    return model


MIXTURES = [mixtral, qwen3_moe, gpt_oss, deepseek, llama4]
TOKENS = torch.arange(20).view(2, 10) * 7 % 64


def adapted(model, config=None, seed=1, adapter="default", **fields):
    """With an adapter of the experts alone whose B is not zero."""
    config = config or WaRAConfig(target_modules=[], target_parameters=EXPERTS, **{"r": 2, **fields})
    result = get_peft_model(model, config, adapter_name=adapter)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if ".wara_B." in name:
                parameter.normal_(std=0.3)
    return result.eval()


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ParameterLayer)}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def dense_by_pywavelets(layer, wavelet, levels):
    """ΔW of every expert, each by an inverse transform of its own, in float64."""
    factor_a, factor_b = layer.factors("default")
    shape = layer.shape
    found = []
    for expert in range(shape.experts):
        coefficients = {
            name: (factor_b.subband(name)[expert].double() @ factor_a.subband(name)[expert].double()).detach().numpy()
            for name in factor_a.subbands
        }
        found.append(torch.from_numpy(inverse_transform(coefficients, wavelet, shape.lengths, levels)))
    return layer.scaling["default"] * torch.stack(found)


@pytest.mark.parametrize("make", MIXTURES)
@pytest.mark.parametrize(("wavelet", "levels"), [("haar", 1), ("db2", 2)])
def test_output_is_that_of_weights_with_delta_by_pywavelets(make, wavelet, levels):
    model = adapted(in_double(make), wavelet=wavelet, levels=levels, wara_alpha=5.0)
    expected, layers = in_double(make), layers_of(model)
    assert len(layers) in (2, 4)
    assert not torch.allclose(logits(model), logits(expected), atol=1e-3)
    for name, layer in layers.items():
        delta = dense_by_pywavelets(layer, wavelet, levels)
        weight = expected.get_parameter(name.removeprefix("base_model.model."))
        weight.data += delta.mT if layer.kind.keeps_in_first else delta
        torch.testing.assert_close(layer.get_delta_weight("default"), delta.mT if layer.kind.keeps_in_first else delta)
    torch.testing.assert_close(logits(model), logits(expected))


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_that_multiplies(make, implementation):
    model = adapted(make())
    expected = logits(copy.deepcopy(model).merge_and_unload())
    model.base_model.model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)


def test_other_implementations_are_refused_by_name():
    model = adapted(mixtral())
    experts = model.base_model.model.model.layers[0].mlp.experts
    weight = experts.gate_up_proj.adapted_weight(experts.base_layer)
    message = r"layers\.0\.mlp\.experts\.gate_up_proj.* uses torch's 'einsum'.*set_experts_implementation"
    with (
        experts._in_place([(experts.base_layer, "gate_up_proj", weight)]),
        pytest.raises(NotImplementedError, match=message),
    ):
        torch.einsum("eij->ei", experts.base_layer.gate_up_proj)
    assert isinstance(experts.base_layer.gate_up_proj, nn.Parameter)


def lora_twin(model, make, rank):
    """The same ΔW as a LoRA made by PEFT itself, with the factors written into it by its own layout."""
    twin = get_peft_model(make(), LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=EXPERTS))
    for name, layer in layers_of(model).items():
        owner, _, parameter = name.rpartition(".")
        wrapper = twin.get_submodule(owner)
        while wrapper.parameter_name != parameter:
            wrapper = wrapper.base_layer
        factor_a, factor_b = (factor.synthesise().detach() for factor in layer.factors("default"))
        experts, _, n = factor_a.shape
        wrapper.lora_A["default"].weight.data = factor_a.reshape(experts * rank, n).clone()
        columns = factor_b.permute(1, 2, 0).reshape(-1, rank * experts)  # (m, R · E), by LoRA's own order
        wrapper.lora_B["default"].weight.data = layer.scaling["default"] * columns
    return twin


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss])
def test_outputs_and_gradients_are_those_of_loras_of_rank_r(make):
    model = adapted(in_double(make))
    twin = lora_twin(model, lambda: in_double(make), rank=8)
    torch.testing.assert_close(logits(model), logits(twin))
    for peft_model in (model, twin):
        peft_model(TOKENS, labels=TOKENS).loss.backward()
    for name, layer in layers_of(model).items():
        owner, _, parameter = name.rpartition(".")
        wrapper = twin.get_submodule(owner)
        while wrapper.parameter_name != parameter:
            wrapper = wrapper.base_layer
        by_lora = wrapper.lora_A["default"].weight.grad.view(layer.shape.experts, 8, -1)
        factor_a = layer.factors("default")[0]
        probe = torch.randn_like(factor_a.level1)
        # the derivative along a change of A is that along the change of Â that it makes
        along = (factor_a.level1.grad * probe).sum()
        factor_a.level1.data.copy_(probe)
        torch.testing.assert_close(along, (by_lora * factor_a.synthesise().detach()).sum())


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves")
@pytest.mark.parametrize("make", [make for make in MIXTURES if make is not llama4])
def test_all_linear_trains_what_lora_trains_and_as_many_parameters(make):
    ours = get_peft_model(make(), WaRAConfig(r=4, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loras = get_peft_model(make(), LoraConfig(r=8, target_modules="all-linear"))
    assert ours.get_nb_trainable_parameters()[0] == loras.get_nb_trainable_parameters()[0] > 1500
    config, loras_config = ours.peft_config["default"], loras.peft_config["default"]
    assert set(config.target_parameters or ()) == set(loras_config.target_parameters or ())
    assert set(config.target_modules) == set(loras_config.target_modules)


def test_llama4s_router_is_no_layer_to_adapt():
    """It returns two values, with which LoRA's forward fails too."""
    message = r"'model\.layers\.0\.feed_forward\.router'.*, a .* returns several values"
    with pytest.raises(ValueError, match=message):
        get_peft_model(llama4(), WaRAConfig(target_modules=["router"]))
    with pytest.warns(UserWarning, match=message):
        model = get_peft_model(llama4(), WaRAConfig(target_modules="all-linear"))
    assert not any("router" in name for name in module_shapes(model))
    assert logits(model).isfinite().all()


OTHER_CONFIGS = {
    "tiny": {"form": "tiny", "r": 2},
    "shared": {"form": "shared"},
    "orthogonal": {"init_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_all_linear_leaves_experts_out_that_a_config_cannot_adapt(name, tmp_path):
    with pytest.warns(UserWarning, match="all-linear") as caught:
        model = get_peft_model(mixtral(), WaRAConfig(target_modules="all-linear", **OTHER_CONFIGS[name]))
    (message,) = [str(warning.message) for warning in caught if "all-linear" in str(warning.message)]
    assert "leaves 6 of 14 layers out" in message  # the router's weight and two stacks, twice
    assert "'model.layers.0.mlp.experts.gate_up_proj'" in message and "bare parameters" in message
    adapted = {key.rpartition(".")[2] for key in module_shapes(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixtral(), tmp_path)
    assert module_shapes(again) == module_shapes(model)
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("named", [{"target_parameters": EXPERTS}, {"target_modules": ["q_proj", "w1", "w2", "w3"]}])
@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_experts_that_are_named_are_refused(name, named):
    fields = {"target_modules": "all-linear", **named, **OTHER_CONFIGS[name]}
    if "target_parameters" in named:  # which "all-linear" beside them does not excuse
        with (
            pytest.warns(UserWarning, match="all-linear"),
            pytest.raises(ValueError, match=r"gate_up_proj.*bare parameters"),
        ):
            get_peft_model(mixtral(), WaRAConfig(**fields))
    else:
        with pytest.raises(ValueError, match=r"(gate_up|down)_proj.*bare parameters"):
            get_peft_model(mixtral(), WaRAConfig(**fields))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]])
def test_dense_layers_that_lora_leaves_out_are_named(targets):
    """PEFT takes their names for those of the experts' layers."""
    with pytest.warns(UserWarning, match="takes the names of target module") as caught:
        ours = get_peft_model(deepseek(), WaRAConfig(target_modules=targets))
    message = next(str(warning.message) for warning in caught if "takes the names" in str(warning.message))
    assert "'model.layers.0.mlp.down_proj'" in message and "and 3 more" in message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loras = get_peft_model(deepseek(), LoraConfig(r=8, target_modules=targets))
    dense = [name for name, module in loras.named_modules() if isinstance(module, nn.Linear) and "mlp" in name]
    assert len([name for name in dense if "lora_" not in name]) == 6
    assert not any("shared_experts" in name for name in module_shapes(ours))


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_all_linear_has_the_router_and_doubled_ranks_of_two_layers_in_one(make):
    ours = get_peft_model(make(), WaRAConfig(r=4, target_modules="all-linear"))
    layer = ours.get_submodule("base_model.model.model.layers.1.mlp")
    assert layer.gate.weight.total_rank("default") == 16
    assert layer.experts.down_proj.total_rank("default") == 16
    assert layer.experts.gate_up_proj.total_rank("default") == 32


def test_a_saved_adapter_of_shared_experts_layers_is_not_taken_for_one_of_experts(tmp_path):
    """Adapters that "all-linear" made before it followed LoRA name these layers in full."""
    names = [f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
    config = WaRAConfig(r=2, target_modules=names, module_shapes={name: ["Linear", 16, 16] for name in names})
    model = get_peft_model(deepseek(), config)
    assert list(module_shapes(model)) == names
    adapted(deepseek(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(deepseek(), tmp_path)
    assert list(module_shapes(loaded)) == names


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj"], 1792),  # attention alone
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 13056),
        (r".*_proj", 13056),
        ("all-linear", 13440),  # and the router
    ],
)
def test_numbers_of_trained_parameters_by_targets(targets, count):
    counts = []
    for config in (WaRAConfig(r=4, target_modules=targets), LoraConfig(r=8, target_modules=targets)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # LoRA's pattern of doubled ranks matches no module
            model = get_peft_model(qwen3_moe(num_experts=8, moe_intermediate_size=8), config)
        counts.append(model.get_nb_trainable_parameters()[0])
    assert counts == [count, count]


def test_names_of_experts_layers_of_old_models_are_taken_as_lora_takes_them():
    model = get_peft_model(mixtral(), WaRAConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"], wara_alpha=3.0))
    config = model.peft_config["default"]
    assert config.target_parameters == ["down_proj", "gate_up_proj"] and config.target_modules == {"q_proj"}
    layers = layers_of(model)
    scalings = {
        name.rpartition(".")[2]: (layer.total_rank("default"), layer.scaling["default"])
        for name, layer in layers.items()
    }
    assert scalings == {"down_proj": (8, 3 / 8), "gate_up_proj": (16, 3 / 8)}
    with pytest.raises(ValueError, match="w1 without also targeting w3"):
        get_peft_model(mixtral(), WaRAConfig(target_modules=["w1"]))


def test_doubled_ranks_follow_subband_ranks_and_give_way_to_patterns():
    ranks = {"aa1": 3, "ad1": 1, "da1": 1, "dd1": 0}
    model = get_peft_model(mixtral(), WaRAConfig(target_modules="all-linear", subband_ranks=ranks))
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.factors("default")[0].ranks == {"aa1": 6, "ad1": 2, "da1": 2}
    assert experts.down_proj.factors("default")[0].ranks == {"aa1": 3, "ad1": 1, "da1": 1}
    pattern = {"experts.gate_up_proj": 1, r"layers\.0\..*\.down_proj": {"aa1": 5}}
    model = get_peft_model(mixtral(), WaRAConfig(target_modules="all-linear", r=2, rank_pattern=pattern))
    experts = [layer.mlp.experts for layer in model.base_model.model.model.layers]
    assert [each.gate_up_proj.total_rank("default") for each in experts] == [4, 4]
    assert [each.down_proj.total_rank("default") for each in experts] == [11, 8]


class Watch(TorchDispatchMode):
    """The largest tensor that any operation makes, by number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_no_tensor_of_the_size_of_the_weight_in_forward_or_backward(implementation):
    sizes = {**SIZES, "hidden_size": 64, "num_hidden_layers": 1}
    fields = {"head_dim": 8, "moe_intermediate_size": 48, "num_experts": 16, "num_experts_per_tok": 1}
    found = {}
    for kind in ("wara", "lora"):
        torch.manual_seed(0)
        base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **fields}))
        base.set_experts_implementation(implementation)
        smallest = min(layer.numel() for name, layer in base.named_parameters() if "experts" in name)
        assert smallest == 16 * 48 * 64
        config = (
            WaRAConfig(r=1, target_modules=[], target_parameters=EXPERTS)
            if kind == "wara"
            else LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS)
        )
        model = get_peft_model(base, config)
        with Watch() as watch:
            model(TOKENS, labels=TOKENS).loss.backward()
        trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert all(grad is not None for grad in trained)
        found[kind] = watch.largest
    assert found["wara"] < smallest / 2
    assert found["lora"] >= smallest  # or the test would not see one


@pytest.mark.parametrize("make", MIXTURES)
def test_a_new_adapter_changes_nothing_and_trains_everything(make):
    model = get_peft_model(make(), WaRAConfig(target_modules=[], target_parameters=EXPERTS))
    assert torch.equal(logits(model), logits(make()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(6):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".wara_" in name} != set()


def test_first_values_are_drawn_as_loras_for_every_expert():
    torch.manual_seed(0)
    layer = nn.Module()
    layer.experts = nn.Module()
    layer.experts.weight = nn.Parameter(torch.zeros(32, 40, 64))
    model = get_peft_model(layer, WaRAConfig(r=4, target_parameters=["experts.weight"], target_modules=[]))
    factor_a, factor_b = model.base_model.model.experts.weight.factors("default")
    assert factor_a.level1.shape == (32, 16, 32) and factor_b.level1.shape == (32, 20, 16)
    bound = 32**-0.5  # of kaiming_uniform with a = √5 and fan-in n_1
    drawn = factor_a.level1.detach()
    assert drawn.abs().max() <= bound and float(drawn.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert (factor_a().detach().square().sum(-1).mean() - 1 / 3).abs() < 0.01
    assert factor_b.level1.abs().max() == 0


def test_keys_shapes_and_config_on_disk(tmp_path):
    adapted(qwen3_moe(), levels=2, subband_ranks={"aa0": 1}).save_pretrained(tmp_path)
    saved = SavedAdapter(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["module_shapes"][name] == ["Experts", 32, 16, 4, 0]
    assert fields["module_shapes"]["model.layers.1.mlp.experts.down_proj"] == ["Experts", 16, 16, 4, 1]
    assert saved._contents.factors[name] == {
        f"{name}.wara_A.level0": (4, 1, 16),
        f"{name}.wara_A.level1": (4, 6, 8),
        f"{name}.wara_A.level2": (4, 8, 4),
        f"{name}.wara_B.level0": (4, 32, 1),
        f"{name}.wara_B.level1": (4, 16, 6),
        f"{name}.wara_B.level2": (4, 8, 8),
    }


@pytest.mark.parametrize("make", MIXTURES)
def test_saved_adapters_load_and_export_to_loras_target_parameters(make, tmp_path):
    model = adapted(make(), r=3, levels=2, wavelet="db2")
    expected = logits(model)
    model.save_pretrained(tmp_path / "wara")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make(), tmp_path / "wara")), expected, atol=0, rtol=0)
    for place, source in (("of_model", model), ("of_directory", tmp_path / "wara")):
        with pytest.warns(UserWarning, match="not adapters of Experts"):
            wara_peft.save_as_lora(tmp_path / place, source)
        lora = PeftModel.from_pretrained(make(), tmp_path / place)
        assert lora.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(logits(lora), expected, atol=3e-6, rtol=1e-5)


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path):
    adapted(qwen3_moe()).save_pretrained(tmp_path)
    message = r"gate_up_proj' \(saved \(32, 16, 4, 0\), here \(32, 16, 8, 0\)\)"
    with pytest.warns(UserWarning, match=message), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(qwen3_moe(num_experts=8), tmp_path)


@pytest.mark.parametrize("entry", [["Experts", 32, 16], ["Experts", 32, 16, 0, 0], ["Linear", 32, 16, 4, 0]])
def test_a_description_with_other_numbers_is_refused(tmp_path, entry):
    adapted(qwen3_moe()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["module_shapes"]["model.layers.0.mlp.experts.gate_up_proj"] = entry
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="not the numbers of such a kind"):
        SavedAdapter(tmp_path)


def test_export_with_modules_beside_parameters_and_of_a_lower_rank(tmp_path):
    config = WaRAConfig(r=2, target_modules="all-linear", rank_pattern={"down_proj": 1})
    model = adapted(mixtral(), config)
    with pytest.warns(UserWarning):
        wara_peft.save_as_lora(tmp_path / "exact", model)
        lora_config, state_dict = wara_peft.to_lora(model, rank=2)
    lora = PeftModel.from_pretrained(mixtral(), tmp_path / "exact")
    torch.testing.assert_close(logits(lora), logits(model), atol=3e-6, rtol=1e-5)
    assert lora_config.r == 2
    name = "model.layers.0.mlp.experts.down_proj"
    key = "base_model.model.model.layers.0.mlp.experts"
    columns = state_dict[f"{key}.lora_B.weight"].view(16, 2, 4).permute(2, 0, 1)
    product = columns @ state_dict[f"{key}.lora_A.weight"].view(4, 2, 24)
    delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach()
    left, values, right = torch.linalg.svd(delta)
    best = left[..., :2] * values[:, None, :2] @ right[:, :2]
    torch.testing.assert_close(product, best, atol=1e-5, rtol=1e-4)


def test_inspection_counts_experts(tmp_path):
    model = adapted(gpt_oss(), r=3)
    model.save_pretrained(tmp_path)
    report = inspect_adapter(SavedAdapter(tmp_path))
    assert sum(module.parameters for module in report.modules) == model.get_nb_trainable_parameters()[0]
    layers = layers_of(model)
    for module in report.modules:
        delta = layers[f"base_model.model.{module.name}"].get_delta_weight("default")
        assert module.experts == 4 and module.rank == 12 and module.ranks["ad1"] == 3
        assert sum(module.energy.values()) == pytest.approx(float(delta.square().sum()), rel=1e-4)
        assert module.lora_parameters == 4 * 12 * (module.out_features + module.in_features)


@pytest.mark.parametrize("make", MIXTURES)
def test_merge_and_unmerge(make):
    model = adapted(make())
    expected, base = logits(model), make()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, atol=3e-6, rtol=1e-5)
    assert all(layer.merged for layer in layers_of(model).values())
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=3e-6, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    merged = model.merge_and_unload()
    assert {type(module) for module in merged.modules()} == {type(module) for module in base.modules()}
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, atol=3e-6, rtol=1e-5)


def test_a_merge_that_fails_half_way_leaves_everything_as_it_was():
    model = adapted(mixtral())
    expected = logits(model)
    broken = model.base_model.model.model.layers[1].mlp.experts.down_proj.factors("default")[1].level1
    whole = broken.detach().clone()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (lambda: model.merge_adapter(safe_merge=True), lambda: model.merge_and_unload(safe_merge=True)):
        broken.data[1, 2, 3] = float("nan")
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj"):
            merge()
        broken.data.copy_(whole)
        assert not any(layer.merged for layer in layers_of(model).values())
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert torch.equal(logits(model), expected)


def test_merging_in_bfloat16_rounds_once_and_builds_one_experts_delta_at_a_time():
    model = adapted(qwen3_moe().to(torch.bfloat16))
    layer = model.base_model.model.model.layers[0].mlp.experts.gate_up_proj
    exact = layer.bare.weight.double() + layer.get_delta_weight("default", torch.float64)
    layer.merge()
    torch.testing.assert_close(layer.bare.weight.data, exact.to(torch.bfloat16), atol=0, rtol=2**-8)


def test_several_adapters_of_different_parameters():
    model = adapted(mixtral(), r=1)
    model.add_adapter(
        "other", WaRAConfig(r=2, target_modules=["q_proj"], target_parameters=["gate.weight", "down_proj"])
    )
    layers = layers_of(model)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".other." in name)
    first = logits(model)
    torch.manual_seed(3)
    for layer in layers.values():
        if "other" in layer.wara_B:
            layer.wara_B["other"].level1.data.normal_()
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    twin = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(both, logits(twin), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both, first, atol=1e-3)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


def test_the_router_answers_as_its_own_attributes_ask():
    model = adapted(deepseek(), WaRAConfig(r=2, target_modules=[], target_parameters=["gate.weight"]))
    router = model.base_model.model.model.layers[1].mlp.gate
    assert isinstance(router, AdaptedModule)
    assert router.e_score_correction_bias is router.base_layer.e_score_correction_bias
    twin = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(model), logits(twin), atol=3e-6, rtol=1e-5)
    assert not torch.allclose(logits(model), logits(deepseek()), atol=1e-5)


def test_dropout_is_on_the_way_to_the_update_alone():
    model = adapted(qwen3_moe(), wara_dropout=0.5)
    expected = logits(copy.deepcopy(model).merge_and_unload())
    torch.testing.assert_close(logits(model), expected, atol=3e-6, rtol=1e-5)
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(logits(model), expected, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(qwen3_moe()))


def test_bfloat16_base_with_float32_factors():
    model = adapted(qwen3_moe().to(torch.bfloat16))
    assert model.base_model.model.model.layers[0].mlp.experts.down_proj.factors("default")[0].dtype == torch.float32
    exact = adapted(qwen3_moe())
    base = logits(qwen3_moe())
    change = (logits(exact) - base).norm()
    assert (logits(model).float() - logits(exact)).norm() < 0.15 * change
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(exact).float() - logits(copy.deepcopy(exact).merge_and_unload()).float()).norm() < 0.15 * change


def test_generation_and_checkpointing_and_router_logits():
    model = adapted(mixtral())
    twin = copy.deepcopy(model).merge_and_unload()
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=TOKENS, **kwargs), twin.generate(input_ids=TOKENS, **kwargs))
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()
    model.base_model.model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, grads[name])


def test_forwards_in_several_threads():
    model = adapted(mixtral())
    expected, found = logits(model), []
    threads = [threading.Thread(target=lambda: found.extend(logits(model) for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and all(torch.allclose(result, expected, atol=1e-6) for result in found)
    assert all("gate_up_proj" not in vars(m.base_layer) for m in model.modules() if isinstance(m, AdaptedModule))


def test_a_compiled_model_computes_the_adapted_module_outside_of_its_graphs():
    torch.manual_seed(0)
    base = Weighted()
    config = WaRAConfig(r=2, target_modules=[], target_parameters=["inner.weight"])
    model = adapted(base, config)
    x = torch.randn(5, 8)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.allclose(model(x), x @ base.inner.base_layer.weight.T + 1.0, atol=1e-3)


def test_an_error_inside_leaves_the_parameters_in_place():
    model = adapted(mixtral())
    experts = model.base_model.model.model.layers[0].mlp.experts
    with pytest.raises(TypeError):
        experts("no tensor")
    assert isinstance(experts.base_layer.gate_up_proj, nn.Parameter)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1.0


class Owner(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = weight
        self.inner.layer = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (mixtral, {"form": "shared"}, "form='shared'.*use form='subband'"),
        (mixtral, {"init_weights": "orthogonal"}, "init_weights='orthogonal'"),
        (mixtral, {"target_parameters": ["q_proj.weight"]}, "Name the layer, .*q_proj'.* in `target_modules`"),
        (
            mixtral,
            {"rank_pattern": {"down_proj": dict.fromkeys(("aa1", "ad1", "da1", "dd1"), 0)}},
            "without|every subband out",
        ),
        (lambda: Owner(nn.Parameter(torch.zeros(3))), {"target_parameters": ["inner.weight"]}, r"its shape is \(3,\)"),
        (
            lambda: Owner(nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)),
            {"target_parameters": ["inner.weight"]},
            "quantized, to torch.int8",
        ),
        (
            lambda: Owner(nn.Parameter(torch.zeros(2, 3))),
            {"target_parameters": ["inner.weight"], "target_modules": ["layer"]},
            "'inner' is adapted too, 'inner.layer'",
        ),
        (
            lambda: Owner(nn.Parameter(torch.zeros(2, 3))).inner,
            {"target_parameters": ["weight"]},
            "No|belongs to the model",
        ),
    ],
)
def test_refusals_name_parameter_and_remedy(model, fields, message):
    config = WaRAConfig(**{"target_modules": [], "target_parameters": EXPERTS, **fields})
    base = model()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == before


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts_in_four_bits_compute_as_what_they_stand_for(implementation):
    """Beside a model whose weights are the dequantized ones, and LoRA in the same quantized model."""
    quantized = mixtral(hidden_size=64, intermediate_size=64)
    plain = copy.deepcopy(quantized)
    for model in (quantized, plain):
        model.set_experts_implementation(implementation)
    for layer, same in zip(quantized.model.layers, plain.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
            same.mlp.experts.get_parameter(name).data = getattr(layer.mlp.experts, name).clone()
    model, expected = adapted(quantized), adapted(plain)
    set_peft_model_state_dict(model, get_peft_model_state_dict(expected))
    torch.testing.assert_close(logits(model), logits(expected))
    for each in (model, expected):
        each(TOKENS, labels=TOKENS).loss.backward()
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters() if parameter.grad is not None}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == gradients.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, gradients[name])
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj' is parametrized.*without quantization"):
        model.merge_adapter()
    assert model.state_dict().keys() == keys
    with model.disable_adapter():
        before = logits(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    torch.testing.assert_close(logits(model.unload()), before)


def test_what_does_not_go_with_parameters_says_so():
    model = adapted(mixtral())
    with pytest.raises(ValueError, match=r"adapted parameters .*set_adapter"):
        model(TOKENS, adapter_names=["default", "default"])
    model.add_adapter("other", WaRAConfig(target_modules=[], target_parameters=EXPERTS))
    with pytest.raises(ValueError, match="cannot be combined"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    with pytest.raises(TypeError, match=r"gate\.weight .*target_parameters"):
        config = WaRAConfig(target_modules="all-linear")
        wara_peft.allocate_ranks(mixtral(), config, [{"input_ids": TOKENS, "labels": TOKENS}])


def test_components_of_experts_are_not_chosen_one_by_one():
    model = adapted(mixtral())
    for change in (
        lambda: keep_components(model, "default", {}),
        lambda: wara_peft.RankSchedule(budget=100).start(model, total_steps=10),
    ):
        with pytest.raises(ValueError, match=r"bare parameters, such as '.*gate_up_proj'.*rank_pattern"):
            change()


def test_a_name_of_several_that_nothing_has_warns():
    with pytest.warns(RuntimeWarning, match=r"called 'expert\.gate', 'qproj', which"):
        get_peft_model(
            mixtral(), WaRAConfig(target_modules=["q_proj", "qproj"], target_parameters=[*EXPERTS, "expert.gate"])
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        get_peft_model(mixtral(), WaRAConfig(target_modules=["q_proj", "w1", "w3"]))


def test_merging_on_disk(tmp_path):
    model = adapted(gpt_oss())
    model.save_pretrained(tmp_path / "adapter")
    gpt_oss().save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = GptOssForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), atol=3e-6, rtol=1e-5)


def test_merging_on_disk_where_transformers_splits_the_experts_is_refused(tmp_path):
    adapted(mixtral()).save_pretrained(tmp_path / "adapter")
    mixtral().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"down_proj.*use `merge_and_unload`"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_transformers_own_adapters(tmp_path):
    model = mixtral()
    model.add_adapter(WaRAConfig(r=2, target_modules=[], target_parameters=EXPERTS))
    for name, parameter in model.named_parameters():
        if ".wara_B." in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    other = mixtral()
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(other), logits(model))
    assert not torch.allclose(logits(other), logits(mixtral()), atol=1e-3)


def test_dense_reference_is_not_the_layers_own():
    """`dense_by_pywavelets` agrees with the reference for linear layers on one of the experts."""
    layer = next(iter(layers_of(adapted(mixtral().double())).values()))
    single = get_peft_model(
        nn.Sequential(nn.Linear(16, 48, bias=False, dtype=torch.float64)), WaRAConfig(r=2, target_modules=["0"])
    )
    linear = single.base_model.model[0]
    for own, other in zip(linear.factors("default"), layer.factors("default"), strict=True):
        own.level1.data.copy_(other.level1[2])
    expected = torch.from_numpy(inverse_transform(dense_coefficients(linear), "haar", (48, 16), 1))
    torch.testing.assert_close(dense_by_pywavelets(layer, "haar", 1)[2], expected)
