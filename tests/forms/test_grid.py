"""`form="grid"`: subbands of the token grid against PyWavelets and ptwt, its collapse to LoRA, and what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import ptwt
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.references import WAVELETS, grid_parts, module_shapes, tiny_vit
from wara_peft import WaRAConfig, frozen_factors, save_as_lora, to_lora
from wara_peft.forms.observed_grids import SeenGrids
from wara_peft.forms.token_grid import TokenGrid
from wara_peft.forms.token_mixing import TokenMixing, grid_subbands
from wara_peft.layers.linear import Linear

GRIDS = ((8, 8), (7, 7), (14, 14), (5, 12), (1, 6), (3, 1))
TARGETS = ["q_proj", "fc1"]


def images(size: int = 14, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(0))


def parts(signal: torch.Tensor, wavelet: str, levels: int, prefix: int = 0) -> torch.Tensor:
    """P_s of a signal of shape (H, W) on a grid, for all subbands: (H, W, 3L + 1)."""
    mixing = TokenMixing("proj", TokenGrid(tuple(signal.shape), prefix), wavelet, grid_subbands(levels))
    hidden = signal.reshape(1, -1, 1).expand(1, -1, 3 * levels + 1)
    return mixing(hidden).view(*signal.shape, -1)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_parts_equal_pywavelets_and_add_up(wavelet, levels):
    for grid in GRIDS:
        signal = torch.randn(*grid, dtype=torch.float64)
        found = parts(signal, wavelet, levels)
        np.testing.assert_allclose(found.numpy(), grid_parts(signal.numpy(), wavelet, levels), atol=1e-12)
        tolerance = 1e-11 if wavelet == "sym4" else 1e-12  # whose taps PyWavelets has to 12 digits
        torch.testing.assert_close(found.sum(-1), signal, atol=tolerance, rtol=0)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_parts_equal_ptwt(levels):
    signal = torch.randn(16, 24, dtype=torch.float64)
    coefficients = ptwt.wavedec2(signal, "haar", level=levels)
    found = parts(signal, "haar", levels)
    order = [(0, None)] + [(levels + 1 - level, band) for level in range(1, levels + 1) for band in (1, 0, 2)]
    for index, (place, band) in enumerate(order):
        kept = [torch.zeros_like(coefficients[0])]
        kept += [tuple(torch.zeros_like(detail) for detail in details) for details in coefficients[1:]]
        if band is None:
            kept[0] = coefficients[0]
        else:
            kept[place] = tuple(
                coefficients[place][other] if other == band else torch.zeros_like(kept[place][other])
                for other in range(3)
            )
        expected = ptwt.waverec2(tuple(kept), "haar").view(16, 24)
        torch.testing.assert_close(found[..., index], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_parts_are_projectors_where_the_sides_divide(wavelet):
    signal = torch.randn(8, 12, dtype=torch.float64)
    first = parts(signal, wavelet, 2)
    for index in range(7):
        again = parts(first[..., index], wavelet, 2)
        expected = torch.zeros_like(again)
        expected[..., index] = first[..., index]
        torch.testing.assert_close(again, expected, atol=1e-12, rtol=0)


def adapted(m: int = 6, n: int = 10, **fields) -> Linear:
    torch.manual_seed(0)
    config = WaRAConfig(**{"form": "grid", "init_weights": False, "wara_alpha": 3, **fields})
    return Linear(nn.Linear(n, m).double(), "default", "proj", config).double()


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("ranks", [None, {"aa2": 3, "dd1": 0, "da2": 1}, {"aa2": 0}])
def test_forward(wavelet, ranks):
    """Token by token and subband by subband, with two prefix tokens before a grid of 7 x 5."""
    layer = adapted(
        r=2, levels=2, wavelet=wavelet, subband_ranks=ranks, grid_size=(7, 5), num_prefix_tokens=2, wara_alpha=3
    )
    x = torch.randn(2, 37, 10, dtype=torch.float64)
    factor_a, factor_b = layer.wara_A["default"].weight.detach(), layer.wara_B["default"].weight.detach()
    expected = layer.base_layer(x).detach()
    start = 0
    names = ["aa2", "ad1", "da1", "dd1", "ad2", "da2", "dd2"]
    total = sum((ranks or {}).get(name, 2) for name in names)
    for place, name in enumerate(names):
        rank = (ranks or {}).get(name, 2)
        rows = slice(start, start + rank)
        hidden = x @ factor_a[rows].T
        for image in range(2):
            for channel in range(rank):
                grid = hidden[image, 2:, channel].view(7, 5).numpy()
                mixed = grid_parts(grid, wavelet, 2)[..., place].reshape(-1)
                hidden[image, 2:, channel] = torch.from_numpy(mixed)
        if name != "aa2":
            hidden[:, :2] = 0
        expected += 3 / total * hidden @ factor_b[:, rows].T
        start += rank
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pairs", ["separate", "shared"])
def test_prefix_tokens_and_patches_do_not_meet(pairs):
    layer = adapted(grid_pairs=pairs, num_prefix_tokens=2)
    x = torch.randn(3, 2 + 16, 10, dtype=torch.float64)
    other = x.clone()
    other[:, 2:] += 1
    torch.testing.assert_close(layer(other)[:, :2], layer(x)[:, :2], atol=1e-12, rtol=0)
    other = x.clone()
    other[:, :2] += 1
    torch.testing.assert_close(layer(other)[:, 2:], layer(x)[:, 2:], atol=1e-12, rtol=0)
    first = layer.wara_B["default"].weight[:, :4] @ layer.wara_A["default"].weight[:4]
    expected = layer.base_layer(x[:, :2]) + layer.scaling["default"] * x[:, :2] @ first.T
    torch.testing.assert_close(layer(x)[:, :2], expected, atol=1e-12, rtol=0)


class TestCollapse:
    def lora(self, layer: Linear, a: torch.Tensor, b: torch.Tensor) -> LoraLinear:
        lora = LoraLinear(layer.base_layer, "default", LoraConfig(), r=len(a), lora_alpha=len(a)).double()
        lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = a.clone(), b.clone()
        return lora

    @pytest.mark.parametrize("levels", [1, 2])
    def test_equal_pairs_are_plain_lora(self, levels):
        layer = adapted(r=2, levels=levels, wara_alpha=None, num_prefix_tokens=1, wavelet="db2")
        bands = 3 * levels + 1
        a, b = torch.randn(2, 10, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
        layer.wara_A["default"].weight.data, layer.wara_B["default"].weight.data = (
            a.repeat(bands, 1),
            b.repeat(1, bands),
        )
        x = torch.randn(2, 50, 10, dtype=torch.float64)
        torch.testing.assert_close(layer(x), self.lora(layer, a, b)(x), atol=1e-12, rtol=0)

    def test_a_shared_pair_is_lora_until_its_gains_move(self):
        layer = adapted(r=3, grid_pairs="shared", wara_alpha=None)
        x = torch.randn(2, 50, 10, dtype=torch.float64)
        lora = self.lora(layer, layer.wara_A["default"].weight.data, layer.wara_B["default"].weight.data)
        assert torch.equal(layer.wara_gain["default"], torch.ones(4, 3, dtype=torch.float64))
        torch.testing.assert_close(layer(x), lora(x), atol=1e-12, rtol=0)
        layer.wara_gain["default"].data[1] = 2.0
        assert not torch.allclose(layer(x), lora(x), atol=1e-3)

    def test_gains_weigh_subbands_and_components(self):
        layer = adapted(r=2, grid_pairs="shared", grid_size=(4, 6), num_prefix_tokens=1, wara_alpha=2)
        gain = layer.wara_gain["default"].data = torch.randn(4, 2, dtype=torch.float64)
        x = torch.randn(1, 25, 10, dtype=torch.float64)
        hidden = (x @ layer.wara_A["default"].weight.T).detach()
        expected = torch.empty_like(hidden)
        expected[:, 0] = hidden[:, 0] * gain[0]
        for channel in range(2):
            signal = hidden[0, 1:, channel].view(4, 6).numpy()
            expected[0, 1:, channel] = torch.from_numpy(grid_parts(signal, "haar", 1)).view(-1, 4) @ gain[:, channel]
        expected = layer.base_layer(x) + expected @ layer.wara_B["default"].weight.T
        torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)

    def test_different_pairs_are_no_map_of_single_tokens(self):
        """The same token beside another neighbour comes out differently, which no per-token map can do."""
        layer = adapted(grid_size=(1, 2), num_prefix_tokens=0)
        token, left, right = torch.randn(3, 10, dtype=torch.float64)
        first, second = layer(torch.stack((torch.stack((token, left)), torch.stack((token, right)))))[:, 0]
        assert not torch.allclose(first, second, atol=1e-3)

    def test_a_single_patch_warns(self):
        with pytest.warns(UserWarning, match=r"single patch, in module '.*q_proj'.* makes form='grid' a plain LoRA"):
            get_peft_model(tiny_vit(2), WaRAConfig(form="grid", target_modules=TARGETS))


@pytest.mark.parametrize("pairs", ["separate", "shared"])
def test_gradients(pairs):
    layer = adapted(m=3, n=4, r=1, grid_pairs=pairs, num_prefix_tokens=1).requires_grad_(True)
    names, parameters = zip(*((n, p) for n, p in layer.named_parameters() if "wara" in n), strict=True)
    x = torch.randn(1, 1 + 9, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert len(names) == (3 if pairs == "shared" else 2)
    assert torch.autograd.gradcheck(forward, (x, *(p.detach().requires_grad_() for p in parameters)))


@pytest.mark.parametrize(
    ("grid", "tokens", "expected"),
    [
        (TokenGrid((14, 14), 1), 197, (1, 14, 14)),
        (TokenGrid((14, 14), 5), 201, (5, 14, 14)),
        (TokenGrid((37, 37), 1), 257, (1, 16, 16)),  # an image of another size than the model's own
        (TokenGrid((2, 8), 0), 16, (0, 2, 8)),  # the known size goes before the square
        (TokenGrid((4, 4), 1), 16, None),
        (TokenGrid((3, 5)), 16, (1, 3, 5)),
        (TokenGrid(), 49, (0, 7, 7)),
        (TokenGrid(), 50, (1, 7, 7)),
        (TokenGrid(), 51, None),
        (TokenGrid((3, 5), fixed=True), 19, (4, 3, 5)),
        (TokenGrid((3, 5), fixed=True), 14, None),
        (TokenGrid((3, 5), 0, fixed=True), 16, None),
    ],
)
def test_splits(grid, tokens, expected):
    assert grid.split(tokens) == expected


def test_what_a_model_makes_goes_before_what_its_config_says():
    seen = SeenGrids()
    grid = TokenGrid((4, 4), 1, square=False, seen=seen)
    convolution = nn.Conv2d(1, 1, 1)
    convolution.register_forward_hook(seen.see_output)
    assert (grid.split(17), grid.split(26)) == ((1, 4, 4), None)  # nothing has been seen
    for rows, columns, after_prefix, alone in ((3, 5, (1, 3, 5), (0, 3, 5)), (4, 4, (1, 4, 4), (0, 4, 4))) * 2:
        convolution(torch.zeros(1, 1, rows, columns))
        # 16 tokens are a prefix token before 3 x 5 patches, or 4 x 4 patches whose prefix is gone: the latest decides
        assert grid.split(rows * columns + 1) == after_prefix
        assert grid.split(rows * columns) == alone
    assert grid.split(26) is None


class TestModels:
    def model(self, **fields) -> PeftModel:
        config = {"form": "grid", "target_modules": TARGETS, "init_weights": False, "wara_alpha": 64, **fields}
        return get_peft_model(tiny_vit(), WaRAConfig(**config)).eval()

    def test_keys_shapes_and_counts(self, tmp_path):
        model = self.model(r=3, levels=2, target_modules=["fc1"])
        model.save_pretrained(tmp_path)
        found = {k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
        prefix = "base_model.model.vit.layers"
        assert found == {
            **{f"{prefix}.{layer}.mlp.fc1.wara_A.weight": (21, 16) for layer in (0, 1)},
            **{f"{prefix}.{layer}.mlp.fc1.wara_B.weight": (24, 21) for layer in (0, 1)},
        }
        assert model.get_nb_trainable_parameters()[0] == 2 * 3 * (24 + 16) * 7

        self.model(r=3, levels=2, target_modules=["0.mlp.fc1"], grid_pairs="shared").save_pretrained(tmp_path)
        found = {k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
        module = f"{prefix}.0.mlp.fc1"
        expected = {"wara_A.weight": (3, 16), "wara_B.weight": (24, 3), "wara_gain": (7, 3)}
        assert found == {f"{module}.{name}": shape for name, shape in expected.items()}

    def test_other_image_sizes(self):
        model = self.model()
        assert model(images(14)).logits.shape == (4, 3)
        assert model(images(20), interpolate_pos_encoding=True).logits.shape == (4, 3)
        wide = torch.randn(1, 1, 10, 14)
        explicit = self.model(grid_size=(5, 7))
        expected = explicit(wide, interpolate_pos_encoding=True).logits
        assert torch.equal(model(wide, interpolate_pos_encoding=True).logits, expected)
        layer = model.base_model.model.vit.layers[0].mlp.fc1
        with pytest.raises(
            ValueError,
            match=r"The 33 tokens in module 'vit.layers.0.mlp.fc1' fit no grid: expected 5 x 7, 10 x 10, 7 x 7 of "
            r"patches after 1 prefix tokens. Set `grid_size=\(rows, columns\)` and `num_prefix_tokens`",
        ):
            layer(torch.randn(1, 33, 16))
        for size, length, side in (((5, 7), 14, 7), ((4, 9), 12, 6)):  # the second one has as many patches
            said = (
                rf"grid_size=\({size[0]}, {size[1]}\) is not what module .* sees: .* make \({side}, {side}\) patches"
            )
            with pytest.raises(ValueError, match=said):
                self.model(grid_size=size)(images(length), interpolate_pos_encoding=True)

    def test_inputs_without_tokens(self):
        model = self.model(target_modules=["fc1"])
        with pytest.raises(ValueError, match=r"module '.*fc1' needs inputs of shape \(batch, tokens, features\)"):
            model.base_model.model.vit.layers[0].mlp.fc1(torch.randn(4, 16))

    def test_a_head_is_refused_and_left_out_by_all_linear(self):
        with pytest.raises(
            ValueError, match=r"'classifier', which sees one vector .*exclude_modules=\['classifier'\]"
        ):
            self.model(target_modules=["fc1", "classifier"])
        with pytest.warns(UserWarning, match=r"'all-linear' leaves 1 of 13 layers out.*'classifier'"):
            model = self.model(target_modules="all-linear")
        assert model(images()).logits.shape == (4, 3)
        with_head = self.model(target_modules="all-linear", modules_to_save=["classifier"])  # says nothing
        assert module_shapes(with_head) == module_shapes(model)

    @pytest.mark.parametrize("given", [0, 2])
    def test_a_number_of_prefix_tokens_that_is_not_the_models(self, given):
        base = tiny_vit()
        message = rf"num_prefix_tokens={given} is not what module 'vit.*fc1' sees: its vit model has 1 class"
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, WaRAConfig(form="grid", target_modules=["fc1"], num_prefix_tokens=given))
        assert not any("wara_" in name for name, _ in base.named_modules())
        x, results = images(), []
        for fields in ({}, {"num_prefix_tokens": 1}):
            torch.manual_seed(1)
            results.append(self.model(**fields)(x).logits)
        assert torch.equal(*results)

    @pytest.mark.parametrize("pairs", ["separate", "shared"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_short_bases_autocast_and_checkpointing(self, pairs, dtype):
        torch.manual_seed(1)
        model = get_peft_model(
            tiny_vit().to(dtype), WaRAConfig(form="grid", grid_pairs=pairs, target_modules=TARGETS, init_weights=False)
        )
        assert {p.dtype for n, p in model.named_parameters() if "wara" in n} == {torch.float32}
        exact = copy.deepcopy(model).double()
        x = images()
        expected = exact(x.double()).logits.float()
        torch.testing.assert_close(model(x.to(dtype)).logits.float(), expected, atol=0.05, rtol=0.05)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x.to(dtype)).logits.float(), expected, atol=0.05, rtol=0.05)

        gradients = []
        for checkpointing in (False, True):
            trained = copy.deepcopy(model).train()
            if checkpointing:
                trained.gradient_checkpointing_enable()
                trained.enable_input_require_grads()
            trained(x.to(dtype)).logits.square().sum().backward()
            gradients.append([p.grad for p in trained.parameters() if p.requires_grad])
        assert all(gradient.abs().max() > 0 for gradient in gradients[0])
        torch.testing.assert_close(*gradients, atol=0, rtol=0)

    def test_a_second_adapter_is_frozen_until_it_is_active(self):
        model = get_peft_model(tiny_vit().to(torch.bfloat16), WaRAConfig(target_modules=TARGETS))
        model.add_adapter("other", WaRAConfig(form="grid", grid_pairs="shared", target_modules=TARGETS))

        def trainable() -> set[str]:
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            return {part for name in names for part in name.split(".") if part in ("default", "other")}

        assert trainable() == {"default"}
        model.set_adapter("other")
        assert trainable() == {"other"}

    @pytest.mark.slow
    @pytest.mark.compiler
    @pytest.mark.parametrize("pairs", ["separate", "shared"])
    def test_compiles_without_graph_breaks(self, pairs):
        model = self.model(grid_pairs=pairs, levels=2)
        compiled = torch.compile(model.base_model.model.vit.layers[0], fullgraph=True)
        x = torch.randn(2, 50, 16)
        expected = model.base_model.model.vit.layers[0](x)
        torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.slow
    def test_a_graph_for_each_size(self):
        """And no more when sizes come again, though grids are noted while the model runs."""
        model = self.model()
        sizes = ((14, 14), (10, 14), (14, 14), (10, 14), (14, 14))
        with torch.no_grad():
            batches = [torch.randn(2, 1, *size) for size in sizes]
            expected = [model(x, interpolate_pos_encoding=True).logits for x in batches]
            counter = CompileCounterWithBackend("eager")
            model.base_model.model.compile(fullgraph=True, backend=counter)
            for x, logits in zip(batches, expected, strict=True):
                torch.testing.assert_close(model(x, interpolate_pos_encoding=True).logits, logits)
        assert counter.frame_count == 2

    def test_mixed_batches_several_adapters_and_frozen_factors(self):
        model = self.model()
        torch.manual_seed(2)
        model.add_adapter("other", WaRAConfig(target_modules=TARGETS, init_weights=False, wara_alpha=64))
        x, names = images(), ["default", "other", "__base__", "default"]
        with torch.no_grad():
            alone = {"default": model(x).logits}
            with model.disable_adapter():
                alone["__base__"] = model(x).logits
            model.set_adapter("other")
            alone["other"] = model(x).logits
            expected = torch.stack([alone[name][index] for index, name in enumerate(names)])
            torch.testing.assert_close(model(x, adapter_names=names).logits, expected, atol=1e-5, rtol=1e-5)
            model.base_model.set_adapter(["default", "other"])
            both = model(x).logits
            layer = model.base_model.model.vit.layers[0].mlp.fc1
            tokens = torch.randn(2, 50, 16)
            together = layer(tokens) - layer.base_layer(tokens)
            apart = 0
            for name in ("default", "other"):
                layer.set_adapter(name)
                apart = apart + layer(tokens) - layer.base_layer(tokens)
            torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
            model.base_model.set_adapter(["default", "other"])
            with frozen_factors(model):
                assert torch.equal(model(x).logits, both)


class TestNotMergeable:
    MESSAGE = "form='grid', and in module 'vit.layers.0.*mixes tokens.*cannot be merged or converted to LoRA"

    def model(self) -> PeftModel:
        """A subband adapter on all target modules, and a grid adapter on some of them, both active."""
        model = get_peft_model(tiny_vit(), WaRAConfig(target_modules=TARGETS, init_weights=False))
        model.add_adapter("grid", WaRAConfig(form="grid", target_modules=["fc1"], init_weights=False))
        model.base_model.set_adapter(["default", "grid"])
        return model.eval()

    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize("names", [None, ["grid"], ["default", "grid"]])
    def test_merging_changes_nothing(self, method, names):
        model = self.model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=self.MESSAGE):
            getattr(model, method)(adapter_names=names)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not any(m.merged for m in model.modules() if isinstance(m, Linear))

    def test_layers_say_so_too(self):
        layer = self.model().base_model.model.vit.layers[0].mlp.fc1
        weight = layer.base_layer.weight.clone()
        for call in (lambda: layer.merge(adapter_names=["grid"]), lambda: layer.get_delta_weight("grid")):
            with pytest.raises(ValueError, match=self.MESSAGE):
                call()
        assert torch.equal(layer.base_layer.weight, weight)
        with pytest.warns(UserWarning, match="Already unmerged"):
            layer.unmerge()

    def test_export(self, tmp_path):
        model = self.model()
        for call in (
            lambda: to_lora(model, adapter_name="grid"),
            lambda: to_lora(model, rank=2, adapter_name="grid"),
            lambda: save_as_lora(tmp_path / "lora", model, adapter_name="grid"),
        ):
            with pytest.raises(ValueError, match=self.MESSAGE):
                call()
        assert not (tmp_path / "lora").exists()
        assert not model.base_model.model.vit.layers[0].mlp.fc1.supports_lora_conversion("grid")
        assert to_lora(model, adapter_name="default")[0].r == 16

    def test_the_other_adapter_merges(self):
        model = self.model()
        model.set_adapter("default")
        with torch.no_grad():
            expected = model(images()).logits
            model.merge_adapter(adapter_names=["default"])
            torch.testing.assert_close(model(images()).logits, expected, atol=1e-5, rtol=1e-5)

    def test_combining(self):
        model = self.model()
        before = set(model.state_dict())
        with pytest.raises(
            ValueError, match="Adapter 'grid' cannot be combined by 'cat': it has form='grid', and mixes tokens"
        ):
            model.add_weighted_adapter(["default", "grid"], [1.0, 1.0], "both", "cat")
        with pytest.raises(ValueError, match=r"Adapter 'grid' has form='grid', .* mixes tokens"):
            model.add_weighted_adapter(["default", "grid"], [1.0, 1.0], "both")
        assert set(model.state_dict()) == before
