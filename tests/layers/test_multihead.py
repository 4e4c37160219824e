"""`nn.MultiheadAttention` as a target, beside PEFT's LoRA and beside weights with ΔW by PyWavelets in them."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wara_peft
from tests.references import dense_coefficients, inverse_transform, module_shapes
from wara_peft import WaRAConfig
from wara_peft.layers import weight_stand_in as adapted_weight
from wara_peft.layers.parameters import ParameterLayer

WIDTH, HEADS = 16, 4


class Encoder(nn.Module):
    """Two Transformer layers of PyTorch, whose attentions are called `self_attn`, and a head."""

    def __init__(self, **fields):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True, **fields)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, **kwargs):
        return self.head(self.encoder(x, **kwargs))


class Attention(nn.Module):
    def __init__(self, **fields):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **fields})

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def adapted(base, adapter="default", **fields):
    target = "attn" if isinstance(base, Attention) else "self_attn"
    model = get_peft_model(base, WaRAConfig(**{"r": 2, "target_modules": [target], **fields}), adapter_name=adapter)
    fill(model, adapter=adapter)
    return model.eval()


def fill(model, seed=1, adapter="default"):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".wara_B.{adapter}." in name:
                parameter.normal_(std=0.3)


def layers_of(model):
    return {layer.module_name: layer for layer in model.modules() if isinstance(layer, ParameterLayer)}


def with_dense_weights(base, model):
    """A copy of the base model with W + ΔW, in which each ΔW comes from PyWavelets."""
    result = copy.deepcopy(base)
    for name, layer in layers_of(model).items():
        weight = name if name.endswith("in_proj_weight") else f"{name}.weight"
        parameter = result.get_parameter(weight)
        parameter.data += dense_by_pywavelets(layer).to(parameter.dtype)
    return result.eval()


def dense_by_pywavelets(layer):
    axis = layer.factors("default")[0].axis
    dense = inverse_transform(dense_coefficients(layer), axis.wavelet, layer.shape.lengths, axis.levels)
    return layer.scaling["default"] * torch.from_numpy(dense)


def inputs(seed=2, length=5, batch=3):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


CALLS = {
    "self": {},
    "without weights": {"need_weights": False},
    "of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])},
    "causal": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize(
    ("fields", "call"),
    [
        *((fields, call) for fields in ({}, {"bias": False}) for call in CALLS),
        *(({"add_bias_kv": True, "add_zero_attn": True}, call) for call in CALLS if call != "causal"),
    ],
    ids=str,
)
def test_output_is_that_of_weights_with_delta(fields, call):
    base = Attention(**fields)
    model = adapted(copy.deepcopy(base))
    x = inputs()
    with torch.no_grad():
        expected = with_dense_weights(base, model)(x, x, x, **CALLS[call])
        found = model(x, x, x, **CALLS[call])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], base(x, x, x, **CALLS[call])[0], atol=1e-2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_and_no_batch(batch_first):
    base = Attention(batch_first=batch_first)
    model = adapted(copy.deepcopy(base), levels=2, wavelet="db2", subband_ranks={"aa0": 1, "aa2": 1, "dd1": 2})
    expected = with_dense_weights(base, model)
    query, keys, values = inputs(3), inputs(4), inputs(5)
    with torch.no_grad():
        torch.testing.assert_close(model(query, keys, values), expected(query, keys, values), rtol=1e-4, atol=1e-5)
        one = query[0], keys[0], values[0]
        torch.testing.assert_close(model(*one), expected(*one), rtol=1e-4, atol=1e-5)


def test_another_release_may_give_the_arguments_of_the_attention_other_places(monkeypatch):
    """`nn.MultiheadAttention` gives fourteen arguments by position; we tell them apart by the release's names."""
    model, x = adapted(Attention()), inputs()
    expected = model(x, x, x)
    attention = F.multi_head_attention_forward
    signature = inspect.signature(attention)
    names = ["added", *reversed(signature.parameters)]

    def multi_head_attention_forward(*, added: str, **arguments):
        assert added == "new"
        return attention(**arguments)

    def of_another_release(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        moved = ["new", *(call.arguments[name] for name in names[1:])]
        return adapted_weight.AdaptedWeight.__torch_function__(multi_head_attention_forward, (), tuple(moved))

    monkeypatch.setattr(F, "multi_head_attention_forward", of_another_release)
    monkeypatch.setattr(adapted_weight, "_ATTENTION_PARAMETERS", tuple(names))
    torch.testing.assert_close(model(x, x, x), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_in_pytorchs_transformer_layers_whose_kernel_would_leave_it_out(training, norm_first):
    base = Encoder(norm_first=norm_first).train(training)
    model = adapted(copy.deepcopy(base)).train(training)
    expected = with_dense_weights(base, model).train(training)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5])
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), expected(inputs()), rtol=1e-4, atol=1e-5)
        # In eval mode PyTorch may give zeros for padding, which no one reads.
        found, wanted = (each(inputs(), src_key_padding_mask=padding)[~padding] for each in (model, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_a_and_b_of_rank_r():
    model = adapted(Attention().double()).double().train()
    base = Attention().double()
    x = inputs().double()
    model(x, x, x)[0].square().sum().backward()
    layers = layers_of(model)
    sides, weights = {}, {}
    for name, weight in (("attn.in_proj_weight", "in_proj_weight"), ("attn.out_proj", "out_proj.weight")):
        sides[name] = [factor.synthesise() for factor in layers[name].factors("default")]
        leaves = [side.detach().requires_grad_() for side in sides[name]]
        weights[weight] = base.attn.get_parameter(weight).detach() + layers[name].scaling["default"] * (
            leaves[1] @ leaves[0]
        )
        sides[name].append(leaves)
    torch.func.functional_call(base.attn, weights, (x, x, x))[0].square().sum().backward()
    for name, (a, b, leaves) in sides.items():
        parameters = [parameter for factor in layers[name].factors("default") for parameter in factor.parameters()]
        expected = torch.autograd.grad((a, b), parameters, [leaf.grad for leaf in leaves])
        for parameter, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, value)


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that are made, and are no views of others."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in inputs:
                self.seen.add(tuple(leaf.shape))
        return result


def test_no_delta_weight_is_built():
    x = inputs(length=7)
    seen = {}
    for config in (WaRAConfig(r=2, target_modules=["attn"]), LoraConfig(r=4, target_modules=["attn"])):
        model = get_peft_model(Attention(), config).train()
        with Shapes() as shapes:
            model(x, x, x, need_weights=False)[0].sum().backward()
        seen[config.peft_type] = shapes.seen
    delta_weights = {(3 * WIDTH, WIDTH), (WIDTH, WIDTH)}
    assert seen["WARA"].isdisjoint(delta_weights)
    assert delta_weights <= seen["LORA"]  # or the test would not see one


def test_dropout_is_on_the_way_to_the_update_alone():
    """Dropping out with p = 1 - ε leaves the base attention, whatever the adapter."""
    base = Attention()
    model = adapted(copy.deepcopy(base), wara_dropout=1 - 1e-7).train()
    x = inputs()
    torch.testing.assert_close(model(x, x, x), base(x, x, x))
    model.eval()
    assert not torch.allclose(model(x, x, x)[0], base(x, x, x)[0], atol=1e-2)


def test_lora_of_the_same_rank_loads_the_export(tmp_path):
    model = adapted(Encoder())
    with pytest.warns(UserWarning) as caught:
        wara_peft.save_as_lora(tmp_path, model)
    assert any("adds the update of out_proj twice" in str(warning.message) for warning in caught)
    lora = PeftModel.from_pretrained(Encoder(), tmp_path).eval()
    names = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert sorted(lora.peft_config["default"].target_modules) == names
    x = inputs().requires_grad_()  # or PyTorch's fused layers would leave LoRA out
    base = Encoder().eval()
    for name in names:
        attention = lora.base_model.model.get_submodule(name)
        base.get_submodule(name).in_proj_weight.data += attention.get_delta_weight("default").data
        out_proj = attention.base_layer.out_proj
        base.get_submodule(name).out_proj.weight.data += out_proj.get_delta_weight("default").data
        out_proj.lora_B["default"].weight.data /= 2  # which this PEFT takes twice
    torch.testing.assert_close(base(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-5)


def test_as_many_parameters_as_lora_of_twice_the_rank():
    count = get_peft_model(Encoder(), LoraConfig(r=4, target_modules=["self_attn"])).get_nb_trainable_parameters()[0]
    assert adapted(Encoder()).get_nb_trainable_parameters()[0] == count


def test_saving_loading_and_a_second_adapter(tmp_path):
    model = adapted(Encoder())
    model.save_pretrained(tmp_path)
    expected = model(inputs())
    loaded = PeftModel.from_pretrained(Encoder(), tmp_path).eval()
    torch.testing.assert_close(loaded(inputs()), expected)
    shapes = module_shapes(loaded)
    assert shapes["encoder.layers.0.self_attn.in_proj_weight"] == ["MultiheadAttention", 3 * WIDTH, WIDTH, 0, 0]
    assert shapes["encoder.layers.0.self_attn.out_proj"] == ["Linear", WIDTH, WIDTH]
    loaded.add_adapter("other", WaRAConfig(r=1, target_modules=["self_attn", "head"]))
    torch.testing.assert_close(loaded(inputs()), expected)
    loaded.set_adapter("other")
    fill(loaded, adapter="other")
    assert not torch.allclose(loaded(inputs()), expected, atol=1e-3)
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(inputs()), Encoder().eval()(inputs()))
    loaded.delete_adapter("other")
    loaded.set_adapter("default")
    torch.testing.assert_close(loaded(inputs()), expected)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging(safe_merge):
    model = adapted(Encoder())
    expected = model(inputs().requires_grad_())
    base_keys = Encoder().state_dict().keys()
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(inputs().requires_grad_()), expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert merged.state_dict().keys() == base_keys
    torch.testing.assert_close(merged(inputs()), expected, rtol=1e-4, atol=1e-5)
    assert type(merged.encoder.layers[0].self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj"])
def test_weights_that_are_computed_train_and_do_not_merge(name):
    base = Attention()
    owner = (base.attn, name) if name == "in_proj_weight" else (base.attn.out_proj, "weight")
    nn.utils.parametrizations.weight_norm(*owner)
    plain = {"in_proj_weight": base.attn.in_proj_weight, "out_proj": base.attn.out_proj.weight}
    plain = {key: value.detach().clone() for key, value in plain.items()}
    model, dense, x = adapted(base), Attention(), torch.randn(2, 5, WIDTH)
    layers = model.base_model.model.attn.layers
    for key, weight in {"in_proj_weight": dense.attn.in_proj_weight, "out_proj": dense.attn.out_proj.weight}.items():
        weight.data = plain[key] + layers[key].get_delta_weight("default")
    expected = model(x, x, x)[0]
    torch.testing.assert_close(expected, dense(x, x, x)[0], rtol=1e-4, atol=1e-5)
    keys = model.state_dict().keys()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=rf"Cannot merge: parameter 'attn\.{name}' is parametrized.*parametrizations"
        ):
            merge()
    assert model.state_dict().keys() == keys and torch.equal(model(x, x, x)[0], expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_the_old_weight_norm_is_refused():
    base = Attention()
    nn.utils.weight_norm(base.attn, "in_proj_weight")
    with pytest.raises(ValueError, match=r"'attn\.in_proj_weight' cannot be adapted: it is computed"):
        adapted(base)


def test_refusals():
    with pytest.raises(ValueError, match=r"'attn\.out_proj': MultiheadAttention reads .*whole can be a target"):
        adapted(Attention(), target_modules=["out_proj"])
    with pytest.raises(ValueError, match=r"'attn' .*kdim=8 .*exclude_modules"):
        adapted(Attention(kdim=8, vdim=8))
    with pytest.raises(ValueError, match=r"attn\.in_proj_weight.*form='tiny'"):
        adapted(Attention(), form="tiny")
    base = Attention()
    keys = base.state_dict().keys()
    with pytest.raises(ValueError, match=r"attn\.in_proj_weight.*form='shared'"):
        adapted(base, target_modules=["attn"], form="shared")
    assert base.state_dict().keys() == keys
