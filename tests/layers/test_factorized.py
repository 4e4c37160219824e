"""Adapters beside factorised layers as a whole, against dense float64 algebra and PEFT's LoRA on the factors."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.compression.models import bert
from tests.references import module_shapes
from wara_peft import WaRAConfig, save_as_lora, to_lora
from wara_peft.compression import SVD, compress
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.factorized import DictionaryLinear, LowRankLinear
from wara_peft.factorized.sparse_rows import pack_bits
from wara_peft.inspection.saved_adapter import inspect_adapter
from wara_peft.layers.factorized import FactorizedLinear

N, M, RANK, ATOMS, VALUES = 20, 16, 5, 7, 3


class Layers(nn.Module):
    """One layer of each kind, in float64."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = LowRankLinear(N, M, RANK, dtype=dtype)
        self.second = DictionaryLinear(M, N, ATOMS, VALUES, dtype=dtype)
        with torch.no_grad():
            places = torch.rand(N, ATOMS).argsort(1) < VALUES
            self.second.support.copy_(pack_bits(places))
            for parameter in (self.second.values, self.second.bias):
                nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


def adapted(model: nn.Module, name: str = "default", **fields: Any) -> PeftModel:
    fields = {"target_modules": ["first", "second"], "r": 1, "init_weights": False, **fields}
    return get_peft_model(model, WaRAConfig(**fields), name).eval()


def dense(weights: dict[str, Tensor], model: Layers, x: Tensor) -> Tensor:
    """What the two layers compute with these weights in place of theirs."""
    hidden = torch.tanh(x @ weights["first"].T + model.first.bias)
    return hidden @ weights["second"].T + model.second.bias


def layer_of(model: PeftModel, name: str) -> FactorizedLinear:
    layer = model.base_model.model.get_submodule(name)
    assert isinstance(layer, FactorizedLinear)
    return layer


@pytest.mark.parametrize(
    "fields", [{}, {"wavelet": "db2", "levels": 2}, {"form": "shared"}, {"form": "tiny"}], ids=str
)
def test_computes_and_merges_what_dense_weights_do(fields: dict[str, Any]) -> None:
    base = Layers()
    before = copy.deepcopy(base)
    model = adapted(base, **fields)
    x = torch.randn(3, 4, N, dtype=torch.float64)
    sums, ranks = {}, {}
    for name in ("first", "second"):
        layer = layer_of(model, name)
        delta = layer.get_delta_weight("default")
        assert float(delta.detach().norm()) > 1e-3
        sums[name] = before.get_submodule(name).weight.detach() + delta.double()
        ranks[name] = layer.total_rank("default")
    expected = dense(sums, before, x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)

    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    for name in ("first", "second"):
        state, now = before.get_submodule(name).state_dict(), layer_of(model, name).get_base_layer().state_dict()
        assert state.keys() == now.keys() and all(torch.equal(state[key], now[key]) for key in state)

    merged = model.merge_and_unload()
    assert type(merged.first) is LowRankLinear and merged.first.rank == RANK + ranks["first"]
    assert merged.first.down.out_features == merged.first.up.in_features == merged.first.rank
    assert type(merged.second) is DictionaryLinear
    assert (merged.second.atoms, merged.second.nonzeros) == (ATOMS + ranks["second"], VALUES + ranks["second"])
    for name, weight in sums.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight, rtol=0, atol=1e-6)


def test_merging_in_float64_is_exact() -> None:
    model = adapted(Layers()).double()
    x = torch.randn(5, N, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0, atol=1e-13)


def test_gradients_are_those_of_the_dense_sum() -> None:
    model = adapted(Layers()).double().train()
    layer = layer_of(model, "first")
    x, g = torch.randn(6, N, dtype=torch.float64), torch.randn(6, M, dtype=torch.float64)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert parameters and all("base_layer" not in n for n, p in layer.named_parameters() if p.requires_grad)
    found = torch.autograd.grad((layer(x) * g).sum(), parameters)
    expected = torch.autograd.grad(((x @ layer.get_delta_weight("default").T) * g).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_two_adapters_merge_and_unmerge_together() -> None:
    model = adapted(Layers()).double()
    model.add_adapter("other", WaRAConfig(target_modules=["first"], r=1, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model.double()
    layer = layer_of(model, "first")
    before = {key: value.clone() for key, value in layer.get_base_layer().state_dict().items()}
    deltas = sum(layer.get_delta_weight(name) for name in ("default", "other"))
    expected = layer.get_base_layer().weight + deltas
    model.merge_adapter()
    assert layer.get_base_layer().rank == RANK + 8
    torch.testing.assert_close(layer.get_base_layer().weight, expected, rtol=0, atol=1e-13)
    with model.disable_adapter():  # which takes merged ones out
        model(torch.randn(2, N, dtype=torch.float64))
    assert all(torch.equal(before[key], value) for key, value in layer.get_base_layer().state_dict().items())


def test_a_bias_stays_the_same_parameter() -> None:
    model = adapted(Layers(), bias="all")
    biases = [layer_of(model, name).get_base_layer().bias for name in ("first", "second")]
    model.merge_adapter()
    merged = [layer_of(model, name).get_base_layer().bias for name in ("first", "second")]
    assert all(one is other and one.requires_grad for one, other in zip(biases, merged, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_in_short_dtypes_rounds_the_update_alone(dtype: torch.dtype) -> None:
    base = Layers(dtype)
    before = base.first.up.weight.detach().double() @ base.first.down.weight.detach().double()
    model = adapted(base)
    delta = layer_of(model, "first").get_delta_weight("default", torch.float64)
    model.merge_adapter()
    merged = layer_of(model, "first").get_base_layer()
    assert merged.down.weight.dtype == merged.up.weight.dtype == dtype
    after = merged.up.weight.double() @ merged.down.weight.double()
    error = (after - before - delta).norm() / delta.norm()
    assert 0 < float(error.detach()) < 2 * torch.finfo(dtype).eps


def test_broken_adapters_leave_all_as_it_was() -> None:
    model = adapted(Layers())
    state = copy.deepcopy(model.base_model.model.first.get_base_layer().state_dict())
    with torch.no_grad():
        next(layer_of(model, "second").wara_B.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="module 'second'"):
        model.merge_adapter(safe_merge=True)
    now = layer_of(model, "first").get_base_layer().state_dict()
    assert all(torch.equal(state[key], now[key]) for key in state) and not layer_of(model, "first").merged


def test_a_rank_that_no_layer_has_is_refused() -> None:
    model = adapted(Layers(), target_modules=["first"], r=3)
    with pytest.raises(ValueError, match=r"'first': its rank 5 and the adapter's 12 are together more than 16"):
        model.merge_adapter()
    assert layer_of(model, "first").get_base_layer().rank == RANK


def compressed() -> nn.Module:
    model = bert().double()
    compress(model, SVD(0.6, allocation="uniform"), show_progress_bar=False)
    return model


class TestTargets:
    @pytest.mark.filterwarnings("ignore:levels=1 is more than is useful")
    def test_all_linear_means_the_factors_as_for_lora(self) -> None:
        found = {}
        for config in (WaRAConfig(target_modules="all-linear"), LoraConfig(target_modules="all-linear")):
            tuned = get_peft_model(compressed(), config)
            parts = r"\.(wara_[AB]|lora_[AB])\."
            trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
            found[config.peft_type] = {re.split(parts, name)[0] for name in trained}
        one, other = found.values()
        assert one == other
        # The classifier stays dense.
        assert {name for name in one if not name.endswith((".down", ".up"))} == {"base_model.model.classifier"}

    def test_names_mean_layers_as_a_whole_and_no_warning(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = get_peft_model(compressed(), WaRAConfig(target_modules=["query", "value"]))
        adapted_layers = [n for n, module in model.named_modules() if isinstance(module, FactorizedLinear)]
        assert len(adapted_layers) == 4 and all(name.endswith(("query", "value")) for name in adapted_layers)
        shapes = module_shapes(model)
        assert set(map(tuple, shapes.values())) == {("LowRankLinear", 16, 16)}

    def test_a_layer_and_its_factor_are_refused(self) -> None:
        model = compressed()
        with pytest.raises(ValueError, match=r"query' is a LowRankLinear, and so is its factor '.*query\.down'"):
            get_peft_model(model, WaRAConfig(target_modules=["query", "down"]))
        assert not any("wara" in name for name, _ in model.named_parameters())

    def test_a_layer_whose_factor_has_an_adapter_is_refused(self) -> None:
        model = get_peft_model(compressed(), LoraConfig(target_modules=["query.down"]))
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"its factor '.*query\.down'"):
            warnings.simplefilter("ignore")  # PEFT's, of a second adapter
            get_peft_model(model.base_model.model, WaRAConfig(target_modules=["query"]))


class TestLoraOnFactors:
    """What PEFT can do, beside WaRA."""

    def test_peft_refuses_the_layer_as_a_whole(self) -> None:
        with pytest.raises(ValueError, match=r"(?s)LowRankLinear.*is not supported"):
            get_peft_model(compressed(), LoraConfig(target_modules=["query"]))

    def test_equal_parameters(self) -> None:
        """LoRA r=2 and WaRA r=1 on both factors train 2 (n + r) + 2 (r + m) numbers, WaRA on the layer 2 (n + m)."""
        counts = []
        for names in (["down", "up"], ["query"]):
            for config in (LoraConfig(r=2, target_modules=names), WaRAConfig(r=1, target_modules=names)):
                if names == ["query"] and isinstance(config, LoraConfig):
                    continue
                tuned = get_peft_model(nn.ModuleDict({"query": LowRankLinear(N, M, 6)}), config)
                counts.append(sum(p.numel() for p in tuned.parameters() if p.requires_grad))
        assert counts == [2 * (N + 6 + 6 + M), 2 * (N + 6 + 6 + M), 2 * (N + M)]

    def test_merging_lora_into_factors_keeps_the_rank_and_whole_layers_gain_it(self) -> None:
        base = compressed()
        name = "bert.encoder.layer.0.attention.self.query"
        rank = base.get_submodule(name).rank
        x = torch.randint(3, 40, (2, 8))
        ranks = []
        for config in (
            LoraConfig(r=2, target_modules=["query.down", "query.up"], init_lora_weights=False),
            WaRAConfig(r=1, target_modules=["query"], init_weights=False),
        ):
            tuned = get_peft_model(copy.deepcopy(base), config).eval()
            expected = tuned(input_ids=x).logits
            merged = tuned.merge_and_unload()
            torch.testing.assert_close(merged(input_ids=x).logits, expected, rtol=0, atol=1e-6)
            ranks.append(merged.get_submodule(name).up.in_features)
        assert ranks == [rank, rank + 4]


class TestSaved:
    def saved(self, path: Path) -> tuple[nn.Module, PeftModel]:
        base = compressed()
        model = get_peft_model(
            copy.deepcopy(base), WaRAConfig(r=1, target_modules=["query", "dense"], init_weights=False)
        ).eval()
        model.save_pretrained(path)
        return base, model

    def test_loads_again(self, tmp_path: Path) -> None:
        base, model = self.saved(tmp_path)
        x = torch.randint(3, 40, (2, 8))
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=x).logits, model(input_ids=x).logits, rtol=0, atol=1e-12)
        assert {module.kind for module in inspect_adapter(SavedAdapter(tmp_path)).modules} == {"LowRankLinear"}

    @pytest.mark.filterwarnings("ignore:The saved adapter was trained beside")
    def test_is_refused_by_dense_layers(self, tmp_path: Path) -> None:
        self.saved(tmp_path)
        with pytest.raises(ValueError, match=r"trained beside factorised layers.*compressed model"):
            PeftModel.from_pretrained(bert().double(), tmp_path)

    def test_is_not_merged_into_a_dense_checkpoint(self, tmp_path: Path) -> None:
        self.saved(tmp_path / "adapter")
        bert().save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match="trained beside factorised layers"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    @pytest.mark.parametrize("source", ["model", "path"])
    def test_its_lora_is_exact_beside_the_dense_product(self, tmp_path: Path, source: str) -> None:
        base, model = self.saved(tmp_path / "adapter")
        given = model if source == "model" else tmp_path / "adapter"
        with pytest.raises(ValueError, match="Merge the adapter instead"):
            to_lora(given, strict=True)
        with pytest.warns(UserWarning, match="Neither PEFT nor engines take a LoRA beside factorised layers"):
            save_as_lora(tmp_path / "lora", given)
        multiplied = copy.deepcopy(base)
        for name, layer in base.named_modules():
            if isinstance(layer, LowRankLinear):
                linear = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
                linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
                parent, _, attribute = name.rpartition(".")
                setattr(multiplied.get_submodule(parent), attribute, linear)
        x = torch.randint(3, 40, (2, 8))
        lora = PeftModel.from_pretrained(multiplied, tmp_path / "lora").eval()
        torch.testing.assert_close(lora(input_ids=x).logits, model(input_ids=x).logits, rtol=0, atol=1e-6)
