"""Layers whose parents read their weights and never call them: refused, or seen to it that they are called."""

from __future__ import annotations

import ast
import copy
import re
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.detr import modeling_detr as detr
from transformers.models.wavlm import modeling_wavlm as wavlm

from tests.references import Mlp, module_shapes
from wara_peft import WaRAConfig

SMALL = {"vocab_size": 40, "hidden_size": 16}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
CONFIGS = {
    "mamba": transformers.MambaConfig(**SMALL, num_hidden_layers=1, state_size=4, time_step_rank=4),
    "falcon_mamba": transformers.FalconMambaConfig(**SMALL, num_hidden_layers=1, state_size=4, time_step_rank=4),
    "mamba2": transformers.Mamba2Config(
        **SMALL, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=4, n_groups=1, chunk_size=4
    ),
    "falcon_h1": transformers.FalconH1Config(
        **SMALL,
        **ATTENTION,
        num_hidden_layers=1,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_chunk_size=4,
    ),
    "nemotron_h": transformers.NemotronHConfig(
        **SMALL,
        **ATTENTION,
        layers_block_type=["mamba", "attention"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        chunk_size=4,
    ),
    "jamba": transformers.JambaConfig(
        **SMALL,
        **ATTENTION,
        num_hidden_layers=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
}
TOKENS = torch.arange(1, 13).view(2, 6)


def state_space(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind])


def names_of(kind: str) -> list[str]:
    found = (nn.Linear, nn.Conv1d)
    modules = state_space(kind).named_modules()
    return sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, found)} - {"lm_head"})


def refusal(config, base: nn.Module) -> str | None:
    before = list(base.state_dict())
    try:
        get_peft_model(base, config)
    except ValueError as error:
        assert list(base.state_dict()) == before
        return str(error)
    return None


def calls_of(layers: list[nn.Module], model: nn.Module) -> int:
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    model(input_ids=TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    return len(calls)


@pytest.mark.parametrize("kind", CONFIGS)
def test_state_space_models_are_adapted_as_by_lora_where_that_has_an_effect(kind):
    for name in names_of(kind):
        lora = refusal(LoraConfig(target_modules=[name]), state_space(kind))
        model = state_space(kind)
        message = refusal(WaRAConfig(target_modules=[name], init_weights=False), model)
        if lora is not None or name == "dt_proj":  # which LoRA adapts, to no effect
            assert message is not None, name
            assert "An adapter would have no effect in target module" in message
            assert f".{name}'" in message and "Name others in `target_modules`" in message
            continue
        assert message is None, name
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for training in (True, False):
            assert calls_of(layers, model.train(training)) == len(layers) > 0, (name, training)


def test_lora_has_no_effect_where_it_is_let():
    """PyTorch's products take another kernel for weights that require gradients, so the base model's do not either."""
    model = get_peft_model(state_space("mamba"), LoraConfig(target_modules=["dt_proj"], init_lora_weights=False))
    if calls_of([module for module in model.modules() if isinstance(module, BaseTunerLayer)], model):
        pytest.skip("this release of transformers calls dt_proj where it has no kernel")
    with torch.no_grad():
        base = state_space("mamba").requires_grad_(False)
        assert torch.equal(model(input_ids=TOKENS).logits, base(input_ids=TOKENS).logits)


class TestAllLinear:
    """Layers that the user did not name are left out, with one warning."""

    def test_state_space_models_are_adapted_where_that_has_an_effect(self, tmp_path):
        with pytest.warns(UserWarning, match="all-linear") as caught:
            model = get_peft_model(state_space("mamba"), WaRAConfig(target_modules="all-linear", init_weights=False))
        (message,) = [str(warning.message) for warning in caught if "all-linear" in str(warning.message)]
        assert "leaves 2 of 4 layers out" in message
        assert "'backbone.layers.0.mixer.dt_proj': MambaMixer passes its weight to a kernel" in message
        assert "'backbone.layers.0.mixer.out_proj': the fused kernel" in message
        assert "`exclude_modules=['dt_proj', 'out_proj']` leaves modules out without a warning" in message
        adapted = set(module_shapes(model))
        assert {name.rpartition(".")[2] for name in adapted} == {"in_proj", "x_proj"}
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*all-linear")
            again = PeftModel.from_pretrained(state_space("mamba"), tmp_path)
            silent = WaRAConfig(target_modules="all-linear", exclude_modules=["dt_proj", "out_proj"])
            assert set(module_shapes(get_peft_model(state_space("mamba"), silent))) == adapted
        assert set(module_shapes(again)) == adapted
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)

    @pytest.mark.parametrize("excluded", [["linear1"], r".*linear1", None])
    def test_names_that_end_alike_stay_apart(self, excluded, tmp_path):
        """The attention's out_proj is left out, the model's own is not, also by a saved config."""
        config = WaRAConfig(target_modules="all-linear", exclude_modules=excluded)
        with pytest.warns(UserWarning, match=r"'encoder.self_attn.out_proj': MultiheadAttention reads its weight"):
            model = get_peft_model(Encoder(), config)
        expected = {"out_proj", "encoder.linear2", *([] if excluded else ["encoder.linear1"])}
        assert set(module_shapes(model)) == expected
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(Encoder(), tmp_path)
        assert set(module_shapes(again)) == expected

    @pytest.mark.parametrize("excluded", [["linear1"], r".*linear1", None])
    def test_what_the_warning_names_is_enough(self, excluded):
        fields = {"target_modules": "all-linear", "exclude_modules": excluded}
        with pytest.warns(UserWarning, match="all-linear") as caught:
            model = get_peft_model(Encoder(), WaRAConfig(**fields))
        named = re.search(r"`exclude_modules=(.*)` leaves", str(caught[0].message))
        assert named is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*all-linear")
            fields["exclude_modules"] = ast.literal_eval(named[1])
            again = get_peft_model(Encoder(), WaRAConfig(**fields))
        assert module_shapes(again) == module_shapes(model)

    def test_a_model_of_nothing_else_is_refused(self):
        attention = nn.Sequential(nn.MultiheadAttention(16, 2))
        message = refusal(WaRAConfig(target_modules="all-linear"), attention)
        assert message is not None and "'0.out_proj': MultiheadAttention reads its weight" in message

    def test_a_second_adapter_leaves_out_the_same(self):
        model = get_peft_model(Encoder(), WaRAConfig(target_modules=["linear1"]))
        with pytest.warns(UserWarning, match="leaves 1 of 4 layers out"):
            model.add_adapter("other", WaRAConfig(target_modules="all-linear"))
        assert set(module_shapes(model, "other")) == {"out_proj", "encoder.linear1", "encoder.linear2"}


class Reads(nn.Module):
    """A layer of which only the weight is used, and one of which the dtype is looked at before it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, 8)
        self.called = nn.Linear(8, 8)
        self.by_another = nn.Linear(8, 8)
        nn.init.zeros_(self.called.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        assert self.by_another.weight.dtype == x.dtype
        return self.called(x.to(self.called.weight.dtype))


class CallsAnothers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Reads()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.by_another(self.inner(x))


def test_a_layer_of_which_only_the_weight_is_read_is_refused():
    message = refusal(WaRAConfig(target_modules=["read", "called", "by_another"]), CallsAnothers())
    assert message is not None and "module 'inner.read': Reads reads its weight and never calls it." in message
    assert "`exclude_modules=['read']`" in message
    assert "called'" not in message and "by_another'" not in message


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: wavlm.WavLMAttention(16, 2, num_buckets=4, max_distance=8), "q_proj"),
        (lambda: detr.DetrMHAttentionMap(16, 2), "k_proj"),
    ],
)
def test_layers_of_transformers_of_which_only_the_weight_is_read(make, name):
    """LoRA adapts them, to no effect until it is merged."""
    message = refusal(WaRAConfig(target_modules=[name]), nn.ModuleDict({"attention": make()}))
    assert message is not None and f"no effect in target module 'attention.{name}'" in message


class Encoder(nn.Module):
    """PyTorch's own encoder layer, whose weights eval mode hands to one kernel, and a layer called out_proj."""

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, activation=activation, batch_first=True)
        self.out_proj = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.encoder(x))


class TestPyTorchsAttention:
    x = torch.randn(2, 5, 16)

    @pytest.mark.parametrize("targets", [["out_proj"], ["encoder.self_attn.out_proj"]])
    def test_its_out_proj_is_refused(self, targets):
        message = refusal(WaRAConfig(target_modules=targets), Encoder())
        assert message is not None
        assert "in target module 'encoder.self_attn.out_proj': MultiheadAttention reads its weight" in message
        # Where other modules are called so, the name alone would leave them out as well.
        assert ("exclude_modules=['self_attn.out_proj']" in message) == (targets == ["out_proj"])

    def test_lora_has_no_effect_there(self):
        base = Encoder()
        config = LoraConfig(target_modules=["encoder.self_attn.out_proj"], init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(base), config)
        for training in (True, False):
            torch.manual_seed(0)
            expected = base.train(training)(self.x)
            torch.manual_seed(0)
            torch.testing.assert_close(model.train(training)(self.x), expected)

    def test_an_attention_that_calls_it_is_adapted(self):
        class Calling(nn.MultiheadAttention):
            def forward(self, x):
                return self.out_proj(x)

        model = get_peft_model(nn.Sequential(Calling(16, 2)), WaRAConfig(target_modules=["out_proj"]))
        assert module_shapes(model) == {"0.out_proj": ["Linear", 16, 16]}

    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_encoder_layers_call_their_adapters_in_eval_mode(self, activation):
        base = Encoder(activation)
        model = get_peft_model(
            copy.deepcopy(base), WaRAConfig(target_modules=["linear1", "linear2"], init_weights=False)
        )
        dense = copy.deepcopy(base)
        for name, layer in model.base_model.model.encoder.named_children():
            if isinstance(layer, BaseTunerLayer):
                getattr(dense.encoder, name).weight.data += layer.get_delta_weight("default")
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected = dense.eval()(self.x)
                torch.testing.assert_close(model.eval()(self.x), expected, atol=1e-5, rtol=1e-5)
                with model.disable_adapter():
                    torch.testing.assert_close(model(self.x), base.eval()(self.x), atol=1e-5, rtol=1e-5)
        merged = model.merge_and_unload()
        assert not any(module._forward_pre_hooks for module in merged.modules())
        torch.testing.assert_close(merged(self.x), dense(self.x), atol=1e-5, rtol=1e-5)


class TestPyTorchsEncoder:
    """`nn.TransformerEncoder`, which in eval mode leaves padding out."""

    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def encoder(self, **fields) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, **fields)
        return nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()

    def run(self, model: nn.Module) -> torch.Tensor:
        encoder = next(module for module in model.modules() if isinstance(module, nn.TransformerEncoder))
        with torch.no_grad():
            return encoder(self.x, src_key_padding_mask=self.padding)[~self.padding]

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
    @pytest.mark.parametrize("norm_first", [False, True])  # nested tensors are used without it
    def test_adapters_act_beside_padding(self, norm_first):
        base = self.encoder(norm_first=norm_first)
        model = get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["linear1"], init_weights=False)).eval()
        model.add_adapter("other", WaRAConfig(target_modules=["linear2"], init_weights=False))
        merged = copy.deepcopy(model).merge_and_unload()
        assert not torch.allclose(self.run(model), self.run(base), atol=1e-3)
        torch.testing.assert_close(self.run(model), self.run(merged), atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(self.run(model), self.run(base), atol=1e-5, rtol=1e-5)
        for left in (merged, copy.deepcopy(model).unload(), copy.deepcopy(model).base_model.unload()):
            assert left[0].__dict__.keys() == base[0].__dict__.keys()
            assert left[0].use_nested_tensor == base[0].use_nested_tensor == (not norm_first)


def test_other_models_get_no_hook():
    model = get_peft_model(Mlp(), WaRAConfig(target_modules="all-linear"))
    assert not any(module._forward_pre_hooks for module in model.modules())
