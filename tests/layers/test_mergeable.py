"""Merging into layers that make more of their weight than a product: refused before anything is changed, or exact."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BitConfig, BitModel, PhimoeConfig, Wav2Vec2Config, Wav2Vec2Model
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.moonshine_streaming.modeling_moonshine_streaming import MoonshineStreamingCausalConv1d
from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from wara_peft import WaRAConfig
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.layers.base import WaRALayer

pytestmark = pytest.mark.filterwarnings("ignore:levels=1 is more than is useful")
parametrizations = nn.utils.parametrizations


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * super().forward(x)


class ScaledByCall(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class Masked(nn.Linear):
    """Pruned: its weight is zero wherever its mask is, so with the weight as it is the mask does nothing."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).float())
        self.weight.data *= self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-20, 20))


class Normed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class NormedEmbedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(super().forward(tokens), dim=-1)


class NeedsMore(nn.Linear):
    def forward(self, x: Tensor, *, factor: float) -> Tensor:
        return super().forward(x) * factor


class Same(nn.Linear):
    """A layer that computes what its parent does, in other words and with some bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.bfloat16() @ self.weight.bfloat16().T).to(x.dtype) + self.bias


class Float8(nn.Linear):
    """A layer like the fine-grained float8 ones: its weight is float8, and a scale lies beside it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        scale = self.weight.detach().abs().max() / 400
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.weight = nn.Parameter((self.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale, self.bias)


def patched() -> nn.Linear:
    layer = nn.Linear(8, 6)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


X, TOKENS = torch.linspace(-2, 2, 24).view(3, 8), torch.tensor([[1, 4, 8]])
IMAGE = torch.linspace(-1, 1, 196).view(1, 4, 7, 7)

# layer, input, what is said: one row a case
REFUSED = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 6)), X, "computed from other tensors"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 6)), X, "computed from other tensors"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)), IMAGE, "computed from"),
    "weight_norm of an embedding": (lambda: parametrizations.weight_norm(nn.Embedding(9, 8)), TOKENS, "computed from"),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 6)), X, "computed from other tensors"),
    "old weight_norm of a Conv1D": (lambda: nn.utils.weight_norm(Conv1D(6, 8)), X, "computed from other tensors"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)), IMAGE, "computed from other tensors"),
    "max_norm": (lambda: nn.Embedding(9, 8, max_norm=1.0), TOKENS, "max_norm=1.0"),
    "float8": (lambda: Float8(8, 6), X, "quantized, to torch.float8_e4m3fn"),
    "scaled": (lambda: Scaled(8, 6), X, "its class, Scaled"),
    "scaled by its call": (lambda: ScaledByCall(8, 6), X, "its class, ScaledByCall"),
    "masked": (lambda: Masked(8, 6), X, "its class, Masked"),
    "clamped": (lambda: Clamped(8, 6), X, "its class, Clamped"),
    "normed": (lambda: Normed(8, 6), X, "its class, Normed"),
    "normed embedding": (lambda: NormedEmbedding(9, 8), TOKENS, "its class, NormedEmbedding"),
    "patched": (patched, X, "its class, Linear"),
    "standardized": (lambda: WeightStandardizedConv2d(4, 6, 3), IMAGE, "its class, WeightStandardizedConv2d"),
}
MERGED = {
    "NonDynamicallyQuantizableLinear": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 6), X),
    "Same": (lambda: Same(8, 6), X),
    "Falcon": (lambda: FalconLinear(8, 6), X),
    "EsmFold": (lambda: EsmFoldLinear(8, 6), X),
    "Gemma": (lambda: Gemma3TextScaledWordEmbedding(9, 8, None, 3.0), TOKENS),
    "BART": (lambda: BartScaledWordEmbedding(9, 8, None, 4.0), TOKENS),
    "EfficientNet": (lambda: EfficientNetDepthwiseConv2d(4), IMAGE),
}
NOT_ADAPTED = {
    "BART's positions": (lambda: BartLearnedPositionalEmbedding(9, 8), "looks up other rows"),
    "causal": (lambda: MoonshineStreamingCausalConv1d(4, 6, 3), "returns several values"),
    "same padding": (lambda: Conv2dSamePadding(4, 6, 3), "another shape"),
    "router": (lambda: PhimoeTopKRouter(PhimoeConfig(hidden_size=8, num_local_experts=4)), "returns several values"),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(8, 8), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(make):
    torch.manual_seed(0)
    return get_peft_model(Model(make()), WaRAConfig(target_modules=["first", "layer"], init_weights=False)).eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case):
    make, x, said = REFUSED[case]
    model = adapted(make)
    layer = model.base_model.model.layer
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        expected = model(x)
        assert not torch.allclose(base, expected, atol=1e-2)  # beside the layer the adapter does what it should
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for merge in (
            model.merge_adapter,
            model.merge_and_unload,
            lambda: model.merge_and_unload(safe_merge=True),
            layer.merge,  # as diffusers calls it
        ):
            with pytest.raises(ValueError, match=rf"Cannot merge into module 'layer': .*{re.escape(said)}.*unmerged"):
                merge()
        assert all(torch.equal(value.float(), before[name].float()) for name, value in model.state_dict().items())
        assert not any(module.merged for module in model.modules() if isinstance(module, WaRALayer))
        assert torch.equal(model(x), expected)


class DropsOut(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 6)
        self.kept = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.kept(x))


def test_trying_a_forward_calls_no_hook_and_leaves_every_module_in_its_mode():
    layer, seen = DropsOut(), []
    layer.kept.eval()
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    model = get_peft_model(Model(layer), WaRAConfig(target_modules=["layer"], init_weights=False))
    assert layer.training and not layer.kept.training and not seen
    expected = model(X)
    assert seen == ["before", "after"]
    merged = model.merge_and_unload()
    assert layer.training and not layer.kept.training and seen == ["before", "after"]
    torch.testing.assert_close(merged(X), expected, atol=1e-5, rtol=1e-5)


def test_a_layer_that_asks_for_more_than_its_input_is_refused():
    with pytest.raises(ValueError, match="its class, NeedsMore"):
        adapted(lambda: NeedsMore(8, 6)).merge_adapter()


@pytest.mark.parametrize("case", MERGED)
def test_harmless_subclasses_merge(case):
    make, x = MERGED[case]
    model = adapted(make)
    with torch.no_grad():
        expected = model(x)
        tolerance = 0.1 if case == "Same" else 1e-5
        training = model.base_model.model.layer.base_layer.training
        torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=tolerance, rtol=tolerance)
        assert model.base_model.model.layer.training == training


@pytest.mark.parametrize("case", NOT_ADAPTED)
def test_layers_whose_training_would_be_wrong_are_not_adapted(case):
    make, said = NOT_ADAPTED[case]
    base = Model(make())
    keys = base.state_dict().keys()
    with pytest.raises(ValueError, match=rf"Target module 'layer', a .* cannot be adapted: .*{said}.*exclude_modules"):
        get_peft_model(base, WaRAConfig(target_modules=["first", "layer"]))
    assert base.state_dict().keys() == keys


def test_trying_a_layer_draws_no_random_numbers_and_leaves_it_as_it_is():
    model = adapted(lambda: FalconLinear(8, 6)).train()
    state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    model.base_model.model.layer.check_mergeable(["default"])
    assert torch.equal(torch.get_rng_state(), state) and model.base_model.model.layer.base_layer.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_form_tiny_needs_weights_that_are_not_in_float8():
    with pytest.raises(ValueError, match=r"needs the weight of module 'layer', which is quantized, to torch.float8"):
        get_peft_model(Model(Float8(8, 6)), WaRAConfig(form="tiny", r=2, target_modules=["layer"]))


def test_wav2vec2s_positional_convolution(tmp_path):
    """transformers computes its weight by `weight_norm`; all other layers merge."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    convolutions = {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (4,), "num_conv_pos_embedding_groups": 2}

    def base() -> Wav2Vec2Model:
        torch.manual_seed(0)
        return Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=8)).eval()

    x = torch.randn(1, 80)
    for targets in (["pos_conv_embed.conv", "q_proj"], ["conv_layers.0.conv", "q_proj"]):
        config = WaRAConfig(target_modules=targets, init_weights=False, r=2)
        model = get_peft_model(base(), config).eval()
        expected = model(x).last_hidden_state
        if "pos_conv_embed.conv" in targets:
            with pytest.raises(ValueError, match=r"'encoder.pos_conv_embed.conv': .*remove_parametrizations"):
                model.merge_and_unload()
            # The remedy of the message makes the two equal.
            model.save_pretrained(tmp_path)
            plain = base()
            nn.utils.parametrize.remove_parametrizations(plain.encoder.pos_conv_embed.conv, "weight")
            model = PeftModel.from_pretrained(plain, tmp_path).eval()
        torch.testing.assert_close(model.merge_and_unload()(x).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_on_disk(tmp_path):
    torch.manual_seed(0)
    fields = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_groups": 2}
    base = BitModel(BitConfig(num_channels=1, layer_type="bottleneck", **fields)).eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, WaRAConfig(target_modules=["conv1"], init_weights=False, r=1))
    with pytest.raises(ValueError, match="its class, WeightStandardizedConv2d"):
        model.merge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Cannot merge into module 'encoder\..*conv1': .*WeightStandardizedConv2d"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
