"""Adapter layers against PyWavelets, ptwt and PEFT's LoRA: ΔW, forward, gradients, scaling, merging, memory."""

from __future__ import annotations

import math

import numpy as np
import ptwt
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tests.references import WAVELETS, dense_coefficients, inverse_transform, sizes
from wara_peft import WaRAConfig
from wara_peft.layers.linear import Linear

SHAPES = ((1, 1), (1, 6), (5, 1), (3, 2), (8, 8), (7, 12), (16, 5), (22, 13))


def adapted(base: nn.Module, **fields) -> Linear:
    """The layer with one adapter, in float64, with random factors unless `fields` say otherwise."""
    torch.manual_seed(0)
    return Linear(base.double(), "default", "proj", WaRAConfig(**{"init_weights": False, **fields})).double()


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_delta_weight_equals_pywavelets(wavelet, levels):
    ranks = {"aa0": 1, f"aa{levels}": 3, "da1": 1}
    for shape in SHAPES:
        m, n = shape
        config = {"r": 2, "wavelet": wavelet, "levels": levels, "subband_ranks": ranks, "wara_alpha": 5}
        layer = adapted(nn.Linear(n, m), **config)
        total_rank = 2 * (3 * levels + 1) + 1 + 1 - 1

        expected = 5 / total_rank * inverse_transform(dense_coefficients(layer), wavelet, shape, levels)

        delta = layer.get_delta_weight("default")
        np.testing.assert_allclose(delta.detach().numpy(), expected, atol=1e-12)
        x = torch.randn(3, 4, n, dtype=torch.float64)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T, atol=1e-10, rtol=0)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_shared_form_equals_pywavelets(wavelet):
    for shape in SHAPES:
        layer = adapted(nn.Linear(*shape[::-1]), form="shared", r=3, wavelet=wavelet, wara_alpha=2)
        coefficients = dense_coefficients(layer)
        np.testing.assert_array_equal(coefficients["aa1"], coefficients["dd1"])
        expected = 2 / 6 * inverse_transform(coefficients, wavelet, shape, 1)
        np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_haar_equals_ptwt(levels):
    layer = adapted(nn.Linear(24, 16), levels=levels)
    c = {name: torch.from_numpy(value)[None] for name, value in dense_coefficients(layer).items()}
    coarse_to_fine = [(c[f"da{level}"], c[f"ad{level}"], c[f"dd{level}"]) for level in range(levels, 0, -1)]
    expected = ptwt.waverec2((c[f"aa{levels}"], *coarse_to_fine), "haar")
    torch.testing.assert_close(layer.get_delta_weight("default"), expected.squeeze(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", ["subband", "shared"])
def test_conv1d_has_the_transposed_delta(form):
    linear = adapted(nn.Linear(9, 14), form=form, wavelet="db2")
    conv = adapted(Conv1D(14, 9), form=form, wavelet="db2")
    conv.load_state_dict({k: v for k, v in linear.state_dict().items() if "wara" in k}, strict=False)
    torch.testing.assert_close(conv.get_delta_weight("default"), linear.get_delta_weight("default").T)
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    expected = conv.base_layer(x) + x @ linear.get_delta_weight("default").T
    torch.testing.assert_close(conv(x), expected, atol=1e-10, rtol=0)
    conv.merge()
    torch.testing.assert_close(conv(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"wavelet": "haar"},
        {"wavelet": "db4", "levels": 2, "subband_ranks": {"aa0": 1, "dd1": 0}},
        {"form": "shared", "wavelet": "sym4"},
    ],
)
def test_gradients(fields):
    layer = adapted(nn.Linear(7, 6), r=1, wara_alpha=3, **fields).requires_grad_(True)
    names, parameters = zip(*((n, p) for n, p in layer.named_parameters() if "wara" in n), strict=True)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *(p.detach().requires_grad_() for p in parameters)))


class TestPlainLora:
    """`aa0` alone is PEFT's LoRA with the same numbers."""

    def pair(self, **fields) -> tuple[Linear, LoraLinear]:
        base = nn.Linear(10, 7).double()
        ours = adapted(base, subband_ranks={"aa0": 4, "aa1": 0, "ad1": 0, "da1": 0, "dd1": 0}, **fields)
        config = LoraConfig(r=4, lora_alpha=fields["wara_alpha"], use_rslora=fields["use_rslora"])
        theirs = LoraLinear(base, "default", config, r=4, lora_alpha=fields["wara_alpha"]).double()
        theirs.lora_A["default"].weight.data = ours.wara_A["default"].level0.data.clone()
        theirs.lora_B["default"].weight.data = ours.wara_B["default"].level0.data.clone()
        return ours, theirs

    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_outputs_and_gradients(self, use_rslora):
        ours, theirs = self.pair(wara_alpha=6, use_rslora=use_rslora)
        assert [name for name, _ in ours.wara_A["default"].named_parameters()] == ["level0"]
        x = torch.randn(5, 10, dtype=torch.float64)
        weight = torch.randn(5, 7, dtype=torch.float64)
        results = []
        for layer, names in ((ours, ("wara_A.default.level0", "wara_B.default.level0")), (theirs, None)):
            names = names or ("lora_A.default.weight", "lora_B.default.weight")
            inputs = x.clone().requires_grad_()
            output = layer(inputs)
            gradients = torch.autograd.grad(output, [inputs, *(layer.get_parameter(n) for n in names)], weight)
            results.append((output, *gradients))
        torch.testing.assert_close(*results, atol=1e-12, rtol=0)

    def test_mixed_with_others_it_adds_up(self):
        base = nn.Linear(10, 7)
        mixed = adapted(base, r=2, subband_ranks={"aa0": 4}, wara_alpha=12)
        without = adapted(base, r=2, wara_alpha=8)
        state = {k: v for k, v in mixed.state_dict().items() if "level1" in k}
        without.load_state_dict(state, strict=False)
        pair = mixed.wara_B["default"].level0 @ mixed.wara_A["default"].level0
        torch.testing.assert_close(
            mixed.get_delta_weight("default"), without.get_delta_weight("default") + pair, atol=1e-12, rtol=0
        )


def test_initialisation_is_that_of_lora():
    ours = Linear(nn.Linear(4096, 64), "default", "proj", WaRAConfig(r=16, levels=2))
    assert ours.get_delta_weight("default").abs().max() == 0
    norms = ours.wara_A["default"]().square().sum(1)
    torch.testing.assert_close(norms.mean(), torch.tensor(1 / 3), atol=0.02, rtol=0)
    for rows in ours.wara_A["default"].parameters():
        assert rows.abs().max() <= 1 / math.sqrt(rows.shape[1])
    assert adapted(nn.Linear(8, 8), init_weights=False).get_delta_weight("default").abs().max() > 0


@pytest.mark.parametrize(("levels", "expected"), [(1, 0.7), (3, 0.5)])
def test_first_adam_step_moves_less_than_in_lora(levels, expected):
    """Of LoRA of the same R and scaling: about √(Σ_s r_s m_s / (R m)), for B moves by the learning rate everywhere."""
    rank = 3 * levels + 1
    base, x, weight = nn.Linear(512, 512), torch.randn(64, 512), torch.randn(64, 512)
    ours = Linear(base, "default", "proj", WaRAConfig(r=16, levels=levels))
    theirs = LoraLinear(base, "default", LoraConfig(), r=16 * rank, lora_alpha=16 * rank)
    norms = []
    for layer in (ours, theirs):
        base.requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
        (layer(x) * weight).sum().backward()
        optimizer.step()
        norms.append(layer.get_delta_weight("default").norm().item())
    assert norms[0] / norms[1] == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_parameter_counts_equal_the_formulas(levels):
    def count(m: int, n: int, **fields) -> int:
        layer = adapted(nn.Linear(n, m), levels=levels, **fields)
        return sum(p.numel() for name, p in layer.named_parameters() if "wara" in name)

    r = 3
    assert count(32, 64, r=r) == r * (32 + 64) * (3 - 2 / 2**levels)
    for m, n in SHAPES:
        out, in_ = sizes(m, levels), sizes(n, levels)
        expected = sum(3 * r * (out[j] + in_[j]) for j in range(1, levels + 1)) + r * (out[levels] + in_[levels])
        assert count(m, n, r=r) == expected
        assert count(m, n, r=r, subband_ranks={"aa0": 5}) == expected + 5 * (m + n)
        if levels == 1:
            assert count(m, n, r=r, form="shared") == r * (out[1] + in_[1])


class TestScaling:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, 1.0),
            ({"use_rslora": True}, 4.0),
            ({"wara_alpha": 8}, 0.5),
            ({"wara_alpha": 8, "use_rslora": True}, 2.0),
            ({"wara_alpha": 8, "form": "shared"}, 1.0),
            ({"alpha_pattern": {"proj": 32}}, 2.0),
            ({"rank_pattern": {"proj": 8}, "wara_alpha": 8}, 0.25),
        ],
    )
    def test_is_alpha_over_total_rank(self, fields, expected):
        assert adapted(nn.Linear(8, 8), **fields).scaling["default"] == expected

    def test_set_scale_unscale(self):
        layer = adapted(nn.Linear(8, 8), wara_alpha=8)
        before = layer.get_delta_weight("default")
        layer.scale_layer(3.0)
        torch.testing.assert_close(layer.get_delta_weight("default"), 3 * before)
        layer.unscale_layer(2.0)
        torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * before)
        layer.set_scale("default", 5.0)
        torch.testing.assert_close(layer.get_delta_weight("default"), 5 * before)
        layer.set_scale("no such adapter", 5.0)
        layer.unscale_layer()
        torch.testing.assert_close(layer.get_delta_weight("default"), before)


class TestMerging:
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_float32(self, safe_merge):
        layer = adapted(nn.Linear(16, 12), wavelet="db2").float()
        x, weight = torch.randn(4, 16), layer.base_layer.weight.clone()
        expected = layer(x)
        layer.merge(safe_merge=safe_merge)
        assert layer.merged_adapters == ["default"]
        torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer.base_layer(x), expected, atol=1e-6, rtol=1e-6)
        layer.unmerge()
        assert not layer.merged
        assert torch.equal(layer.base_layer.weight, weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
    def test_short_bases_are_rounded_once(self, dtype, adapter_dtype):
        layer = adapted(nn.Linear(16, 12), wavelet="db2")
        layer.update_layer("other", WaRAConfig(r=2, init_weights=False))
        layer.set_adapter(["default", "other"])
        layer.to(adapter_dtype).base_layer.to(dtype)
        exact = layer.base_layer.weight.double()
        for name in ("default", "other"):
            exact += layer.double().get_delta_weight(name)
        layer.to(adapter_dtype).base_layer.to(dtype)
        layer.merge()
        # float32 sums that lie next to a rounding boundary may round either way, so one unit in the last place.
        one_rounding = exact.to(dtype)
        assert (layer.base_layer.weight == one_rounding).double().mean() > 0.99
        torch.testing.assert_close(layer.base_layer.weight, one_rounding, atol=1e-6, rtol=torch.finfo(dtype).eps)

    def test_safe_merge_refuses_what_is_not_finite(self):
        layer = adapted(nn.Linear(8, 6))
        before = layer.base_layer.weight.clone()
        layer.wara_B["default"].level1.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default.*'proj'"):
            layer.merge(safe_merge=True)
        assert torch.equal(layer.base_layer.weight, before)
        assert not layer.merged

    def test_unmerging_twice_and_merging_twice_warn(self):
        layer = adapted(nn.Linear(8, 6))
        with pytest.warns(UserWarning, match="Already unmerged"):
            layer.unmerge()
        layer.merge()
        merged = layer.base_layer.weight.clone()
        with pytest.warns(UserWarning, match="already merged"):
            layer.merge()
        assert torch.equal(layer.base_layer.weight, merged)

    def test_disabling_unmerges(self):
        layer = adapted(nn.Linear(8, 6))
        x = torch.randn(2, 8, dtype=torch.float64)
        expected = layer.base_layer(x)
        layer.merge()
        layer.enable_adapters(False)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 10), (2, 3, 4, 10), (0, 10)])
def test_inputs_of_any_rank(shape):
    layer = adapted(nn.Linear(10, 7), wavelet="db2")
    x = torch.randn(shape, dtype=torch.float64)
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_result_has_the_dtype_of_the_base_layer(base_dtype, adapter_dtype):
    layer = adapted(nn.Linear(10, 7)).to(adapter_dtype)
    layer.base_layer.to(base_dtype)
    x = torch.randn(4, 10).to(base_dtype)
    result = layer(x)
    assert result.dtype == base_dtype
    exact = layer.base_layer(x).double() + x.double() @ layer.get_delta_weight("default", torch.float64).T
    tolerance = 8 * max(torch.finfo(base_dtype).eps, torch.finfo(adapter_dtype).eps)
    torch.testing.assert_close(result.double(), exact, atol=tolerance, rtol=tolerance)


def test_dropout_acts_on_the_adapters_input_in_training_only():
    layer = adapted(nn.Linear(10, 7), wara_dropout=0.5)
    x = torch.randn(64, 10, dtype=torch.float64)
    base, delta = layer.base_layer(x), layer.get_delta_weight("default")
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), base + dropped @ delta.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.eval()(x), base + x @ delta.T, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("m", "n"), [(96, 128), (640, 1024), (255, 257)])
def test_forward_never_builds_delta(m, n):
    """No operation of a training step makes a tensor as large as ΔW."""
    layer = adapted(nn.Linear(n, m), wavelet="db2", levels=2)
    layer.base_layer.requires_grad_(False)
    base_weight = layer.base_layer.weight.untyped_storage().data_ptr()
    largest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != base_weight:
                largest = max(largest, result.numel())
            return result

    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    with Recorder():
        layer(x).sum().backward()
    assert 0 < largest < m * n


class TestSavedForBackward:
    def saved_bytes(self, model: nn.Module, x: torch.Tensor) -> int:
        storages = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            model(x)
        return sum(storages.values())

    @pytest.mark.parametrize("fields", [{"r": 4}, {"r": 4, "wavelet": "db4"}, {"form": "shared", "r": 8}])
    def test_at_most_that_of_lora_of_the_same_rank(self, fields):
        class OneLayer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(2048, 2048)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.proj(x)

        x = torch.randn(1, 512, 2048, requires_grad=True)
        lora = get_peft_model(OneLayer(), LoraConfig(r=16, target_modules=["proj"]))
        wara = get_peft_model(OneLayer(), WaRAConfig(target_modules=["proj"], **fields))
        assert wara.base_model.model.proj.total_rank("default") == 16
        # The base layer's weight is saved by both, and is not what is compared.
        weight = wara.base_model.model.proj.base_layer.weight.nbytes
        ratio = (self.saved_bytes(wara, x) - weight) / (self.saved_bytes(lora, x) - weight)
        assert ratio <= 1.01
