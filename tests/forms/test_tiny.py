"""`form="tiny"`: basis against NumPy's SVD of PyWavelets' subbands, ΔW in its span, saved and rebuilt bases."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.references import WAVELETS, Mlp, inverse_transform, module_shapes, saved_config, transform
from wara_peft import WaRAConfig, frozen_factors, save_as_lora
from wara_peft.layers.linear import Linear
from wara_peft.linear_algebra import svd
from wara_peft.linear_algebra.svd import randomised_svd

SHAPES = ((8, 8), (9, 14), (22, 13), (12, 20))


def adapted(base: nn.Module, **fields) -> Linear:
    torch.manual_seed(0)
    config = WaRAConfig(**{"form": "tiny", "init_weights": False, "r": 2, **fields})
    return Linear(base.double(), "default", "proj", config).double()


def reference_basis(weight: np.ndarray, wavelet: str, levels: int, rank: int) -> dict[str, tuple[np.ndarray, ...]]:
    """√σ u and √σ v of the largest singular values of each subband, and of the matrix itself."""
    bands = {"aa0": weight, **transform(weight, wavelet, levels)}
    basis = {}
    for name, band in bands.items():
        u, s, vt = np.linalg.svd(band)
        basis[name] = (u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * vt[:rank])
    return basis


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.filterwarnings("ignore:levels=")
def test_the_basis_equals_numpys_svd_of_pywavelets_subbands(wavelet, levels):
    for m, n in SHAPES:
        layer = adapted(nn.Linear(n, m), wavelet=wavelet, levels=levels, subband_ranks={"aa0": 2, "dd1": 0})
        weight = layer.base_layer.weight.detach().numpy()
        expected = reference_basis(weight, wavelet, levels, 2)
        factor_a, factor_b = layer.factors("default")
        assert set(factor_a.subbands) == set(expected) - {"dd1"}
        for name in factor_a.subbands:
            columns, rows = expected[name]
            found_b, found_a = factor_b.subband(name).numpy(), factor_a.subband(name).numpy()
            signs = np.sign((found_a * rows).sum(1))
            np.testing.assert_allclose(found_a, signs[:, None] * rows, atol=1e-12)
            np.testing.assert_allclose(found_b, signs * columns, atol=1e-12)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_delta_weight_is_in_the_span_of_the_basis(wavelet):
    layer = adapted(nn.Linear(16, 12), wavelet=wavelet, levels=1, r=3)
    basis = reference_basis(layer.base_layer.weight.detach().numpy(), wavelet, 1, 3)
    found = transform(layer.get_delta_weight("default").detach().numpy(), wavelet, 1)
    for name, band in found.items():
        columns, rows = basis[name]
        inside = columns @ np.linalg.pinv(columns) @ band @ np.linalg.pinv(rows) @ rows
        tolerance = 1e-10 if wavelet == "sym4" else 1e-12  # whose taps PyWavelets has to 12 digits
        np.testing.assert_allclose(band, inside, atol=tolerance)
        assert np.linalg.matrix_rank(band, tol=1e-8) == 3


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("base", [nn.Linear(13, 22), Conv1D(22, 13)])
def test_delta_weight_is_the_inverse_transform_of_basis_and_core(core, base):
    layer = adapted(base, wavelet="db2", levels=2, core=core, wara_alpha=5, subband_ranks={"aa0": 1})
    factor_a, factor_b = layer.factors("default")
    coefficients = {}
    for name in factor_a.subbands:
        trained = layer.wara_core["default"].get_parameter(name).detach()
        assert trained.shape == ((len(factor_a.subband(name)),) * (2 if core == "full" else 1))
        trained = torch.diag(trained) if core == "diagonal" else trained
        coefficients[name] = (factor_b.subband(name) @ trained @ factor_a.subband(name)).numpy()
    expected = 5 / 15 * inverse_transform(coefficients, "db2", (22, 13), 2)

    delta = layer.get_delta_weight("default").detach()
    delta = delta.T if isinstance(base, Conv1D) else delta
    np.testing.assert_allclose(delta.numpy(), expected, atol=1e-12)
    x = torch.randn(3, 4, 13, dtype=torch.float64)
    expected = layer.base_layer(x) + x @ delta.T
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=0)
    with torch.no_grad(), frozen_factors(layer):
        torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=0)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_gradients_reach_the_core_alone(core):
    layer = adapted(nn.Linear(8, 9), wavelet="db2", core=core).requires_grad_(True)
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters() if "wara" in name}
    assert {name.split(".")[0] for name in parameters} == {"wara_core"}
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters.values()))


def model_of(base: nn.Module | None = None, **fields) -> PeftModel:
    torch.manual_seed(0)
    base = Mlp() if base is None else base
    config = WaRAConfig(**{"form": "tiny", "r": 2, "target_modules": ["up", "down"], "init_weights": False, **fields})
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize(("core", "each"), [("full", 9), ("diagonal", 3)])
@pytest.mark.parametrize("levels", [1, 2])
def test_trainable_parameters_equal_the_formula(core, each, levels):
    model = model_of(r=3, core=core, levels=levels)
    assert model.get_nb_trainable_parameters()[0] == 2 * (3 * levels + 1) * each


def test_a_new_core_is_zero_and_learns():
    model, x = model_of(init_weights=True), torch.randn(4, 12)
    with model.disable_adapter():
        expected = model(x)
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in gradients} == {"wara_core"}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_nothing_makes_the_basis_trainable_or_rounds_it():
    base = Mlp().to(torch.bfloat16)
    model = model_of(base, wavelet="db2")
    up = model.base_model.model.up
    expected = {name: value.clone() for name, value in up.wara_basis["default"].named_buffers()}
    reference = reference_basis(base.up.base_layer.weight.detach().double().numpy(), "db2", 1, 2)
    np.testing.assert_allclose(np.abs(expected["A_level1"][:2].numpy()), np.abs(reference["aa1"][1]), atol=1e-6)

    other = WaRAConfig(form="tiny", r=2, target_modules=["up"])
    for change in (
        lambda: model.add_adapter("other", other),
        lambda: model.set_adapter("other"),
        lambda: model.set_adapter("default"),
        lambda: model.base_model.set_requires_grad("default", True),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.base_model._mark_only_adapters_as_trainable(model),
        lambda: model.requires_grad_(True),
        lambda: model.bfloat16(),
        lambda: model.half(),
        lambda: model.to(torch.bfloat16),
        lambda: model.delete_adapter("other"),
    ):
        change()
        found = dict(up.wara_basis["default"].named_buffers())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == torch.float32
            assert not found[name].requires_grad
            assert torch.equal(found[name], value)
        assert not any("wara_basis" in name for name, _ in model.named_parameters())
    x = torch.randn(4, 12, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    assert {p.dtype for p in up.wara_core.parameters()} == {torch.bfloat16}
    model.double()
    assert up.wara_basis["default"].A_level1.dtype == torch.float64


class TestSaving:
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))

    def test_keys(self, tmp_path):
        model_of(core="diagonal", target_modules=["up"], subband_ranks={"dd1": 1, "aa0": 3}).save_pretrained(tmp_path)
        found = {k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
        shapes = {
            "wara_core.aa0": (3,),
            "wara_core.aa1": (2,),
            "wara_core.ad1": (2,),
            "wara_core.da1": (2,),
            "wara_core.dd1": (1,),
            "wara_basis.A_level0": (3, 12),
            "wara_basis.A_level1": (7, 6),
            "wara_basis.B_level0": (20, 3),
            "wara_basis.B_level1": (10, 7),
        }
        assert found == {f"base_model.model.up.{name}": shape for name, shape in shapes.items()}

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_saved_basis_is_bit_equal_on_any_base(self, low_cpu_mem_usage, tmp_path):
        """Of an adapter that is loaded nothing is computed from the base: here its weights are zero."""
        model = model_of()
        model.save_pretrained(tmp_path)
        base = Mlp()
        base.up.weight.data.zero_()
        base.down.weight.data.zero_()
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        for name in ("up", "down"):
            found, expected = (getattr(m.base_model.model, name).get_delta_weight("default") for m in (loaded, model))
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_basis_that_is_not_saved_is_made_again(self, low_cpu_mem_usage, tmp_path):
        model = model_of(save_basis=False)
        base = copy.deepcopy(model).unload()
        model.save_pretrained(tmp_path)
        assert not any("wara_basis" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(loaded(self.x), model(self.x), atol=1e-5, rtol=0)
        assert saved_config(loaded)["base_weight_hashes"] == saved_config(model)["base_weight_hashes"]

    @pytest.mark.filterwarnings("ignore:The saved adapter was saved with save_basis=False")
    @pytest.mark.parametrize("change", ["one value", "dtype"])
    def test_another_base_is_refused(self, change, tmp_path):
        model = model_of(save_basis=False)
        base = copy.deepcopy(model).unload()
        model.save_pretrained(tmp_path)
        if change == "dtype":
            base.down.to(torch.bfloat16)
        else:
            base.down.weight.data[3, 4] += 1e-6
        before = {name: type(module) for name, module in base.named_modules()}
        with pytest.raises(ValueError, match=r"other base weights than those of module 'down'.*save_basis=True"):
            PeftModel.from_pretrained(base, tmp_path)
        assert {name: type(module) for name, module in base.named_modules()} == before

    @pytest.mark.filterwarnings("ignore:The saved adapter was saved with save_basis=False")
    @pytest.mark.parametrize("save_basis", [True, False])
    def test_a_saved_config_makes_a_new_adapter_of_other_weights(self, save_basis, tmp_path):
        model_of(save_basis=save_basis).save_pretrained(tmp_path)
        config = WaRAConfig.from_pretrained(tmp_path)
        torch.manual_seed(5)
        base = Mlp()
        expected = get_peft_model(
            copy.deepcopy(base), dataclasses.replace(config, module_shapes=None, base_weight_hashes=None)
        )
        model = get_peft_model(base, config)
        for name in ("up", "down"):  # made at the first use, for a file might have brought the basis
            found, right = (getattr(m.base_model.model, name).factors("default") for m in (model, expected))
            assert torch.equal(found[0].synthesise(), right[0].synthesise())
        assert model(self.x).isfinite().all()

    def test_a_basis_that_never_comes_needs_a_weight(self, tmp_path):
        model_of().save_pretrained(tmp_path)
        model = get_peft_model(Mlp(), WaRAConfig.from_pretrained(tmp_path))
        model.base_model.model.up.base_layer.to("meta")
        with pytest.raises(ValueError, match="weight of module 'up', which is on the meta device"):
            model.base_model.model.up.get_delta_weight("default")

    def test_export_is_exact(self, tmp_path):
        model = model_of(wavelet="db2", levels=2)
        base = copy.deepcopy(model).unload()
        save_as_lora(tmp_path, model)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert isinstance(loaded.peft_config["default"], LoraConfig)
        torch.testing.assert_close(loaded(self.x), model(self.x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(self.x), loaded(self.x), atol=1e-5, rtol=1e-5)

    def test_combining_is_exact(self):
        model = model_of()
        torch.manual_seed(3)
        other = WaRAConfig(form="tiny", r=1, wavelet="db2", target_modules=["up"], init_weights=False)
        model.add_adapter("other", other)
        with pytest.raises(ValueError, match=r"by 'linear': those factors of form='tiny' are fixed. Use 'cat'"):
            model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")
        model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", "cat")
        up = model.base_model.model.up
        expected = 0.5 * up.get_delta_weight("default") - 2.0 * up.get_delta_weight("other")
        torch.testing.assert_close(up.get_delta_weight("sum"), expected, atol=1e-5, rtol=1e-5)


BAD_BASES = {
    "not finite": (
        lambda base: base.down.weight.data[0].fill_(float("inf")),
        {},
        "'down' has values that are not finite",
    ),
    "on the meta device": (lambda base: base.down.to("meta"), {}, "'down', which is on the meta device"),
    "rank": (lambda base: None, {"r": 7}, r"fewer in 'up' \(aa1: 7, at most 6\), 'down' \(aa1: 7"),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_bad_bases_are_refused_before_anything_changes(case):
    spoil, fields, message = BAD_BASES[case]
    base = Mlp()
    spoil(base)
    with pytest.raises(ValueError, match=message):
        model_of(base, **fields)
    assert type(base.up) is nn.Linear


def test_all_linear_leaves_out_heads_with_less_outputs_than_the_rank(tmp_path):
    config = WaRAConfig(form="tiny", r=4, target_modules="all-linear", init_weights=False)
    with pytest.warns(UserWarning, match="all-linear") as caught:
        model = get_peft_model(Mlp(), config)
    (message,) = [str(warning.message) for warning in caught]
    assert "leaves 1 of 3 layers out" in message and "`exclude_modules=['head']`" in message
    assert "there are fewer in 'head' (aa1: 4, at most 2)" in message
    assert set(module_shapes(model)) == {"up", "down"}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Mlp(), tmp_path)
    assert module_shapes(again) == module_shapes(model)
    smaller = WaRAConfig(form="tiny", r=4, target_modules="all-linear", rank_pattern={"head": 2})
    assert set(module_shapes(get_peft_model(Mlp(), smaller))) == {"up", "down", "head"}
    with pytest.raises(ValueError, match=r"fewer in 'head' .*`exclude_modules=\['head'\]`"):
        get_peft_model(Mlp(), WaRAConfig(form="tiny", r=4, target_modules=["up", "head"]))


@pytest.mark.parametrize("saved", [True, False])
def test_a_large_weight_takes_a_randomised_decomposition_only_if_its_basis_is_saved(saved, monkeypatch):
    torch.manual_seed(0)
    base = nn.Linear(520, 400, bias=False)
    base.weight.data = torch.randn(400, 400) @ torch.diag(0.97 ** torch.arange(400)) @ torch.randn(400, 520)
    calls = []
    monkeypatch.setattr(svd, "randomised_svd", lambda *args: calls.append(1) or randomised_svd(*args))
    before = torch.random.get_rng_state()
    config = WaRAConfig(form="tiny", r=4, save_basis=saved, init_weights=False)
    layer = Linear(base, "default", "proj", config)
    assert len(calls) == (4 if saved else 0)
    torch.random.set_rng_state(before)
    again = Linear(base, "default", "proj", config)
    assert all(map(torch.equal, layer.wara_basis["default"].buffers(), again.wara_basis["default"].buffers()))
    bands = transform(base.weight.detach().double().numpy(), "haar", 1)
    for name, (rows, columns) in layer.forms["default"].coefficients(layer.parts("default")).items():
        core = layer.wara_core["default"].get_parameter(name).detach().double()
        truncated = (columns.double() @ torch.linalg.inv(core) @ rows.double()).numpy()
        best = np.sqrt((np.linalg.svd(bands[name], compute_uv=False)[4:] ** 2).sum())
        assert np.linalg.norm(bands[name] - truncated) < 1.001 * best


@pytest.mark.slow
@pytest.mark.compiler
def test_compiles_without_graph_breaks():
    model, x = model_of(wavelet="db2"), torch.randn(4, 12)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, atol=1e-5, rtol=1e-5)


def test_the_hash_is_of_values_in_the_config(tmp_path):
    model = model_of(save_basis=False)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["base_weight_hashes"]
    again = saved_config(model_of(save_basis=False))["base_weight_hashes"]
    assert saved == again
    assert saved.keys() == {"up", "down"}
    assert all(len(value) == 64 for value in saved.values())


@pytest.mark.parametrize("save_basis", [False, True])
def test_checking_targets_writes_nothing(save_basis):
    tuner = model_of(save_basis=save_basis).base_model
    config = tuner.peft_config["default"]
    before = dict(vars(tuner)), dict(vars(config))
    plain = model_of(save_basis=save_basis).unload()
    tuner._prepare_model(config, plain)
    assert (vars(tuner), vars(config)) == before
