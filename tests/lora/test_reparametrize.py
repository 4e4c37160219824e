"""LoRA with factors computed in the wavelet domain, beside dense inverse transforms by PyWavelets and plain LoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import wara_peft
from tests.references import Chain, Mlp, inverse_transform, synthesis_matrix
from wara_peft import WaRAConfig, plain_lora, reparametrize_lora
from wara_peft.lora.reparametrized_layers import ReparametrizedLayer

USEFUL = "ignore:levels=. is more than is useful"
pytestmark = pytest.mark.filterwarnings(USEFUL)
TOKENS = torch.arange(1, 13).view(2, 6)


class OneConv(nn.Module):
    """A convolution of one, two or three axes between linear layers of its channels."""

    def __init__(self, axes: int, **fields: Any) -> None:
        super().__init__()
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.conv = make(9, 14, kernel_size=3, stride=2, padding=1, **fields)
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class FourBit(nn.Module):
    is_loaded_in_4bit = True  # by which PEFT knows

    def __init__(self) -> None:
        super().__init__()
        self.up = bnb.nn.Linear4bit(32, 24, bias=False, quant_type="nf4").to("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16))


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=40, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, **sizes)
    )
    model.set_experts_implementation("eager")  # in float64 grouped products have no kernel
    return model


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# model, fields of LoraConfig, inputs: one row a kind of layer
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Any]] = {
    "linear": (Mlp, {"target_modules": ["up", "down"]}, torch.randn(5, 12)),
    "odd sizes": (lambda: Mlp(width=7, hidden=13), {"target_modules": ["up", "down"]}, torch.randn(5, 7)),
    "conv1d of transformers": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, TOKENS),
    "one axis": (lambda: OneConv(1), {"target_modules": ["conv"]}, torch.randn(2, 9, 8)),
    "two axes": (lambda: OneConv(2), {"target_modules": ["conv"]}, torch.randn(2, 9, 8, 8)),
    "three axes": (lambda: OneConv(3), {"target_modules": ["conv"]}, torch.randn(2, 9, 4, 4, 4)),
    "attention": (Attention, {"target_modules": ["attn"]}, torch.randn(2, 3, 16)),
    "experts": (mixtral, EXPERTS, TOKENS),
}


def lora(kind: str, dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[PeftModel, Any]:
    """A model with LoRA as it begins, and inputs for it."""
    make, own, inputs = KINDS[kind]
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 10, "lora_alpha": 6, **own, **fields})
    model = get_peft_model(make().eval(), config, autocast_adapter_dtype=False).to(dtype)
    return model, inputs if inputs.dtype == torch.int64 else inputs.to(dtype)


@torch.no_grad()
def output(model: nn.Module, inputs: Tensor) -> Tensor:
    result = model(inputs)
    return getattr(result, "logits", result)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give all coefficients values that training may have given them."""
    for name, parameter in model.named_parameters():
        if ".factor." in name:
            parameter.normal_(std=0.3)


def dense(layer: Any, wavelet: str, levels: int, adapter: str = "default") -> Tensor:
    """ΔW of a layer by PyWavelets: one inverse transform for each expert, or element of a convolution's kernel."""
    factor_a, factor_b = layer.lora_A[adapter].factor, layer.lora_B[adapter].factor
    shape = (factor_b.axis.length, factor_a.axis.length)
    experts, kernel = getattr(factor_a, "experts", None), factor_a.kernel

    def one(of_a: Callable[[Tensor], Tensor], of_b: Callable[[Tensor], Tensor]) -> Tensor:
        coefficients = {
            name: (of_b(factor_b.subband(name)) @ of_a(factor_a.subband(name))).detach().numpy()
            for name in factor_a.subbands
        }
        return torch.from_numpy(inverse_transform(coefficients, wavelet, shape, levels))

    scaling = layer.scaling[adapter]
    if experts:
        return scaling * torch.stack([one(lambda a, e=e: a[e], lambda b, e=e: b[e]) for e in range(experts)])
    if kernel:
        places = range(torch.Size(kernel).numel())
        elements = [one(lambda a, p=p: a.flatten(2)[..., p], lambda b: b) for p in places]
        return scaling * torch.stack(elements, -1).view(*shape, *kernel)
    return scaling * one(lambda a: a, lambda b: b)


@pytest.mark.parametrize(("wavelet", "levels"), [("haar", 1), ("db2", 1), ("sym4", 2), ("db4", 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_delta_is_a_dense_inverse_transform(kind, wavelet, levels):
    model, inputs = lora(kind)
    before = output(model, inputs)
    report = reparametrize_lora(model, wavelet=wavelet, levels=levels)
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-12, atol=1e-12)  # B is zero
    fill(model)
    found = dict(layers(model))
    assert [module.name for module in report.modules] == list(found)
    for layer in found.values():
        delta = dense(layer, wavelet, levels)
        given = layer.get_delta_weight("default")
        given = given[0] if isinstance(given, tuple) else given  # an attention's, with that of its output projection
        if getattr(layer, "fan_in_fan_out", False):
            given = given.mT
        torch.testing.assert_close(given, delta, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(output(model, inputs), before, atol=1e-3)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), output(model, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("wavelet", "levels"), [("haar", 1), ("db2", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_adjoint_of_those_of_plain_lora(kind, wavelet, levels):
    model, inputs = lora(kind)
    reparametrize_lora(model, wavelet=wavelet, levels=levels)
    fill(model)
    plain = copy.deepcopy(model)
    plain_lora(plain)
    for each in (model, plain):
        result = each(inputs)
        getattr(result, "logits", result).square().sum().backward()
    compared = 0
    for (_, layer), (_, other) in zip(layers(model), layers(plain), strict=True):
        for side in ("lora_A", "lora_B"):
            factor, gradient = getattr(layer, side)["default"].factor, getattr(other, side)["default"].weight.grad
            experts = getattr(factor, "experts", 0)
            if experts:
                rank = factor.rank
                gradient = (
                    gradient.view(experts, rank, -1)
                    if side == "lora_A"
                    else gradient.view(-1, rank, experts).permute(2, 0, 1)
                )
            row = 0
            for band in factor.subbands:
                level, letter = int(band[2:]), band[side == "lora_A"]
                matrix = torch.from_numpy(synthesis_matrix(wavelet, factor.axis.length, level, letter))
                count = factor.ranks[band]
                if side == "lora_A":
                    rows = gradient.narrow(1 if experts else 0, row, count)
                    expected = (
                        torch.einsum("ern,nd->erd", rows, matrix)
                        if experts
                        else torch.einsum("rn...,nd->rd...", rows, matrix)
                    )
                else:
                    rows = (gradient if experts else gradient.flatten(1)).narrow(-1, row, count)
                    expected = matrix.T @ rows
                start = row - sum(factor.ranks[b] for b in factor.subbands if int(b[2:]) > level)
                own = getattr(factor, f"level{level}").grad.narrow(factor.rank_dim, start, count)
                torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
                row, compared = row + count, compared + 1
    assert compared >= 2 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_plain_lora_has_the_same_weights_and_is_taken_over_again(kind, tmp_path):
    model, inputs = lora(kind)
    reparametrize_lora(model, wavelet="db2", levels=2)
    fill(model)
    expected = output(model, inputs)  # PEFT adds ΔW to the weights of an attention and takes it off again
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    plain_lora(plain)
    assert not any(isinstance(module, ReparametrizedLayer) for module in plain.modules())
    own, _ = lora(kind)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in own.named_modules()]
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {
        n: p.requires_grad for n, p in own.named_parameters()
    }
    assert plain.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    torch.testing.assert_close(output(plain, inputs), expected, rtol=1e-12, atol=1e-12)

    reparametrize_lora(plain, wavelet="db2", levels=2)
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_loras(kind, tmp_path):
    model, inputs = lora(kind)
    reparametrize_lora(model)
    fill(model)
    model.save_pretrained(tmp_path)
    make, _, _ = KINDS[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(make().eval().double(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), rtol=1e-12, atol=1e-12)
    assert not any(isinstance(module, ReparametrizedLayer) for module in loaded.modules())


def test_half_of_the_parameters_and_the_report():
    model, _ = lora("linear", modules_to_save=["head"])
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = reparametrize_lora(model)
    after = sum(p.numel() for p in model.parameters() if p.requires_grad)
    of_lora = 2 * 10 * (12 + 20)
    assert (report.before, report.after) == (of_lora, of_lora // 2)
    assert before - after == of_lora // 2
    assert (
        str(report) == f"2 modules train in the wavelet domain: {of_lora // 2} parameters in place of {of_lora} (50%)."
    )


def test_ranks_are_placed_as_from_lora_places_them():
    for rank, levels in ((4, 1), (10, 1), (9, 2), (16, 2)):
        model, _ = lora("linear", r=rank)
        reparametrize_lora(model, levels=levels)
        config = WaRAConfig.from_lora(LoraConfig(r=rank), match="rank", levels=levels)
        expected = {band: ranks for band, ranks in config.ranks_of("up").items() if ranks}
        for _, layer in layers(model):
            assert layer.lora_A["default"].factor.ranks == layer.lora_B["default"].factor.ranks == expected


def test_ranks_that_are_given():
    model, _ = lora("linear", r=7)
    ranks = {"aa1": 3, "dd1": 2, "aa0": 2, "ad1": 0, "da1": 0}
    reparametrize_lora(model, subband_ranks=ranks)
    fill(model)
    for _, layer in layers(model):
        torch.testing.assert_close(layer.get_delta_weight("default"), dense(layer, "haar", 1))


def test_a_fresh_lora_is_drawn_as_wara_draws():
    """A has the bounds of each level's length; the values that LoRA had drawn are gone."""
    model, _ = lora("linear", r=400)
    reparametrize_lora(model)
    for _, layer in layers(model):
        factor_a, factor_b = layer.lora_A["default"].factor, layer.lora_B["default"].factor
        bound = factor_a.axis.sizes[1] ** -0.5
        values = factor_a.level1.detach()
        assert 0.98 * bound < values.abs().max() <= bound
        assert abs(values.mean()) < 0.05 * bound
        assert not factor_b.level1.any()
    same, _ = lora("linear", r=400)
    torch.manual_seed(5)
    reparametrize_lora(same)
    assert not torch.allclose(next(layers(same))[1].lora_A["default"].factor.level1, values[:, :6], atol=0.01)


class TestOutsideOfTheSpan:
    def trained(self, **fields: Any) -> tuple[PeftModel, Tensor]:
        model, inputs = lora("linear", **{"init_lora_weights": False, **fields})
        return model, inputs

    def test_is_refused_with_the_module_and_the_distance(self):
        model, _ = self.trained()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        types = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=r"'base_model\.model\.up'.* off by \d\d\.\d% of its norm.*project=True"):
            reparametrize_lora(model)
        assert [type(module) for module in model.modules()] == types
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not {"save_pretrained", "load_adapter"} & vars(model).keys()

    def test_project_takes_the_nearest_and_says_what_is_lost(self):
        model, _ = self.trained()
        plain = copy.deepcopy(model)
        report = reparametrize_lora(model, project=True)
        for module, (_, layer), (_, other) in zip(report.modules, layers(model), layers(plain), strict=True):
            before, after = other.get_delta_weight("default"), layer.get_delta_weight("default")
            assert module.lost == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-6)
            weight, kept = other.lora_A["default"].weight, layer.lora_A["default"].weight
            for row, name in enumerate(n for n, r in layer.lora_A["default"].factor.ranks.items() for _ in range(r)):
                matrix = torch.from_numpy(synthesis_matrix("haar", weight.shape[1], 1, name[1]))
                projector = matrix @ torch.linalg.pinv(matrix)
                torch.testing.assert_close(kept[row], projector @ weight[row], rtol=1e-9, atol=1e-9)
        assert f"Projection lost {max(m.lost for m in report.modules):.1%} of ΔW at most" in str(report)

    def test_of_odd_sizes_is_projected_by_least_squares(self):
        model, _ = lora("odd sizes", init_lora_weights=False)
        plain = copy.deepcopy(model)
        reparametrize_lora(model, project=True, wavelet="db2", levels=2)
        for (_, layer), (_, other) in zip(layers(model), layers(plain), strict=True):
            weight, factor = other.lora_A["default"].weight, layer.lora_A["default"].factor
            names = [name for name, rank in factor.ranks.items() for _ in range(rank)]
            for row, name in enumerate(names):
                matrix = torch.from_numpy(synthesis_matrix("db2", weight.shape[1], int(name[2:]), name[1]))
                expected = matrix @ torch.linalg.lstsq(matrix, weight[row][:, None]).solution[:, 0]
                torch.testing.assert_close(layer.lora_A["default"].weight[row], expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_what_a_dtype_rounds_is_in_the_span(self, dtype):
        model, _ = lora("linear")
        reparametrize_lora(model, wavelet="db4", levels=2)
        fill(model)
        plain_lora(model)
        rounded = copy.deepcopy(model).to(dtype)
        expected = {name: value.clone() for name, value in rounded.state_dict().items()}
        wider = copy.deepcopy(rounded).double()  # as PEFT loads files of a narrow dtype
        for each in (rounded, wider):
            reparametrize_lora(each, wavelet="db4", levels=2)
            for name, value in each.state_dict().items():
                scale = float(expected[name].abs().max())
                torch.testing.assert_close(
                    value.to(dtype), expected[name], rtol=0, atol=2 * torch.finfo(dtype).eps * scale
                )

    @pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "eva"])
    def test_first_values_that_mean_something_are_not_thrown_away(self, init):
        make, own, _ = KINDS["linear"]
        model = get_peft_model(make(), LoraConfig(r=8, init_lora_weights=init, **own))
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}' gives the first values a meaning"):
            reparametrize_lora(model)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"wavelet": "bior2.2"}, "not orthogonal"),
            ({"wavelet": "harr"}, "'harr'.*did you mean"),
            ({"levels": 0}, "levels=0"),
            ({"levels": 4}, r"r=10, and levels=4 has 13 subbands.*larger r, fewer levels"),
            ({"subband_ranks": {"aa1": 3}}, r"make 3 components.*r=10"),
            ({"subband_ranks": {"ab1": 10}}, "ab1"),
            ({"adapter_name": "other"}, "'other'; there are 'default'"),
        ],
    )
    def test_arguments(self, fields, words):
        model, _ = lora("linear")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=words):
            reparametrize_lora(model, **fields)
        assert not any(isinstance(module, ReparametrizedLayer) for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_small_rank_of_one_module_stops_before_the_others_change(self):
        model, _ = lora("linear", rank_pattern={"down": 3})
        with pytest.raises(ValueError, match=r"'base_model\.model\.down' has r=3"):
            reparametrize_lora(model)
        assert not any(isinstance(module, ReparametrizedLayer) for module in model.modules())

    def test_a_model_without_lora(self):
        with pytest.raises(ValueError, match=r"Mlp has no LoRA of PEFT's.*LoraConfig"):
            reparametrize_lora(Mlp())
        with pytest.raises(ValueError, match="no LoRA of PEFT's"):
            reparametrize_lora(get_peft_model(Mlp(), WaRAConfig(target_modules=["up"])))
        with pytest.raises(TypeError, match=r"reparametrize_lora\(model, adapter_name\): model must be an nn.Module"):
            reparametrize_lora("default")
        with pytest.raises(ValueError, match="no reparametrised LoRA"):
            plain_lora(lora("linear")[0])

    def test_a_merged_adapter_and_a_second_call(self):
        model, _ = lora("linear")
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"merged in 'base_model\.model\.up'.*unmerge_adapter"):
            reparametrize_lora(model)
        model.unmerge_adapter()
        reparametrize_lora(model)
        with pytest.raises(ValueError, match=r"reparametrised already.*wavelet='haar'.*plain_lora"):
            reparametrize_lora(model, wavelet="db2")

    def test_another_wavelet_than_the_adapters_own(self):
        model, _ = lora("linear")
        reparametrize_lora(model, wavelet="db2")
        fill(model)
        plain_lora(model)
        with pytest.raises(ValueError, match=r"span of wavelet='haar', levels=1.*give the same wavelet"):
            reparametrize_lora(model)

    def test_weights_without_values_and_adalora(self):
        make, own, _ = KINDS["linear"]
        model = get_peft_model(make(), LoraConfig(**own), low_cpu_mem_usage=True)
        with pytest.raises(ValueError, match="no values \\(it is on the meta device\\); load the adapter first"):
            reparametrize_lora(model)

    def test_grouped_convolutions_and_embeddings_stay_plain(self):
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.conv, self.head = nn.Embedding(20, 8), nn.Conv1d(8, 8, 3, groups=2), nn.Linear(8, 6)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.conv(self.embed(x).mT).mT)

        model = get_peft_model(Both(), LoraConfig(r=8, target_modules=["embed", "conv", "head"]))
        report = reparametrize_lora(model)
        assert [module.name for module in report.modules] == ["base_model.model.head"]
        assert report.left.keys() == {"base_model.model.embed", "base_model.model.conv"}
        assert "Left as LoRA: 'base_model.model.embed' (LoRA of embeddings has bare parameters)." in str(report)
        only = get_peft_model(Both(), LoraConfig(r=8, target_modules=["embed"]))
        with pytest.raises(ValueError, match=r"no LoRA here whose factors have weights.*embeddings"):
            reparametrize_lora(only)


def test_only_the_named_or_active_adapter():
    model, _ = lora("linear")
    model.add_adapter("other", LoraConfig(r=8, target_modules=["up"]))
    reparametrize_lora(model)
    assert {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, ReparametrizedLayer)} == {
        "default"
    }
    reparametrize_lora(model, "other", wavelet="db2")
    found = [name for name, module in model.named_modules() if isinstance(module, ReparametrizedLayer)]
    assert sum(name.endswith(".other") for name in found) == 2
    plain_lora(model, "default")
    left = [name for name, module in model.named_modules() if isinstance(module, ReparametrizedLayer)]
    assert left == [name for name in found if name.endswith(".other")]


def test_an_adapter_beside_a_base_in_four_bits():
    torch.manual_seed(0)
    model = get_peft_model(FourBit(), LoraConfig(r=8, target_modules=["up"]))
    reparametrize_lora(model)
    fill(model)
    plain = copy.deepcopy(model)
    plain_lora(plain)
    x = torch.randn(3, 32)
    torch.testing.assert_close(output(model, x), output(plain, x))
    merged = output(copy.deepcopy(plain).merge_and_unload(), x)
    assert not torch.allclose(merged, output(model.get_base_model(), x), atol=1e-3)
    torch.testing.assert_close(output(copy.deepcopy(model).merge_and_unload(), x), merged)
    model.merge_adapter()
    torch.testing.assert_close(output(model, x), merged)
    model.unmerge_adapter()
    model(x).square().sum().backward()
    layer = next(layers(model))[1]
    assert layer.lora_A["default"].factor.level1.grad.norm() > 0


def test_frozen_factors_takes_these_models():
    model, inputs = lora("linear")
    reparametrize_lora(model)
    fill(model)
    expected = output(model, inputs)
    with torch.no_grad(), wara_peft.frozen_factors(model):
        torch.testing.assert_close(output(model, inputs), expected, rtol=0, atol=0)
        factor = next(layers(model))[1].lora_A["default"].factor
        assert factor() is factor()
    with wara_peft.frozen_factors(model), pytest.raises(RuntimeError, match="factors are constants"):
        model(inputs)


def test_a_chain_in_which_lora_has_a_bias_and_dropout_trains_as_plain_lora_with_projected_gradients():
    """One step of gradient descent on coefficients is one on the factors, projected onto their bands."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=8, target_modules=["layers.0", "layers.3"], lora_bias=True, lora_dropout=0.5, use_rslora=True
    )
    model = get_peft_model(Chain(), config, autocast_adapter_dtype=False).double()
    reparametrize_lora(model)
    fill(model)
    plain = copy.deepcopy(model)
    plain_lora(plain)
    x = torch.randn(4, 8, dtype=torch.float64)
    for each in (model, plain):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(3)
        each.train()(x).square().sum().backward()
        optimizer.step()
    reparametrize_lora(plain, project=True)  # S Sᵀ of the step
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)
