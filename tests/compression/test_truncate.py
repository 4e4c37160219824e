"""Cutting factorised layers back, against float64 SVDs."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from tests.compression.models import TwoLayers
from wara_peft import WaRAConfig
from wara_peft.compression import SVD, calibrate, compress, truncate
from wara_peft.factorized import LowRankLinear

QUIET = {"show_progress_bar": False}


def healed() -> tuple[TwoLayers, TwoLayers, torch.Tensor, dict]:
    """A dense model, the same compressed with an adapter merged, inputs, and the ranks before that."""
    dense = TwoLayers(16, 24).double()
    x = torch.randn(300, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64) + 1
    model = copy.deepcopy(dense)
    report = compress(model, SVD(0.6, allocation="uniform"), **QUIET)
    tuned = get_peft_model(model, WaRAConfig(r=1, target_modules=["first", "second"], init_weights=False)).double()
    return dense, tuned.merge_and_unload(), x, {layer.name: layer.rank for layer in report.layers}


class TestTruncate:
    def test_without_statistics_it_is_the_svd_of_the_product(self) -> None:
        _, model, _, ranks = healed()
        before = {name: model.get_submodule(name).weight.detach() for name in ranks}
        assert all(model.get_submodule(name).rank == rank + 4 for name, rank in ranks.items())
        biases = {name: copy.deepcopy(model.get_submodule(name).bias) for name in ranks}
        lost = truncate(model, ranks)
        for name, weight in before.items():
            layer = model.get_submodule(name)
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            r = ranks[name]
            assert isinstance(layer, LowRankLinear) and layer.rank == layer.down.out_features == r
            expected = left[:, :r] * values[:r] @ right[:r]
            torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-10)
            share = float(values[r:].square().sum() / values.square().sum())
            assert lost[name] == pytest.approx(share, rel=1e-8) and share > 1e-4
            if biases[name] is None:
                assert layer.bias is None
            else:
                assert torch.equal(layer.bias, biases[name])

    def test_with_statistics_it_loses_least_of_the_output(self) -> None:
        dense, model, x, ranks = healed()
        statistics = calibrate(dense, [x], target_modules=["first"], **QUIET)
        plain = copy.deepcopy(model)
        before = model.first(x).detach()
        rank = ranks["first"]
        lost = truncate(model, {"first": rank}, statistics)
        truncate(plain, {"first": rank})
        error = (before - model.first(x)).detach()
        spread = before - before.mean(0)
        tail = torch.linalg.svdvals(spread)[rank:].square().sum()
        assert float(error.square().sum()) == pytest.approx(float(tail), rel=1e-6)
        assert lost == {"first": pytest.approx(float(tail / spread.square().sum()), rel=1e-6)}
        assert float(error.square().sum()) < 0.9 * float((before - plain.first(x)).detach().square().sum())

    def test_layers_that_have_no_more_stay(self) -> None:
        _, model, _, ranks = healed()
        first = model.first
        lost = truncate(model, {"first": 99, "second": ranks["second"]})
        assert list(lost) == ["second"] and model.first is first

    def test_one_rank_for_all_and_what_trains(self) -> None:
        _, model, _, _ = healed()
        model.first.requires_grad_(False)
        model.second.requires_grad_(True)
        assert set(truncate(model, 2)) == {"first", "second"}
        assert (model.first.rank, model.second.rank) == (2, 2)
        assert not any(parameter.requires_grad for parameter in model.first.parameters())
        assert all(parameter.requires_grad for parameter in model.second.parameters())

    @pytest.mark.parametrize(
        ("ranks", "message"),
        [
            ({"third": 2}, r"'third', which is no LowRankLinear.*'first', 'second'"),
            ({"first": 2, "second": 0}, "rank=0 of 'second' must be an int of at least 1"),
        ],
    )
    def test_bad_ranks(self, ranks: dict[str, int], message: str) -> None:
        _, model, _, _ = healed()
        first = model.first
        with pytest.raises(ValueError, match=message):
            truncate(model, ranks)
        assert model.first is first

    def test_bad_models_and_statistics(self) -> None:
        dense, model, x, _ = healed()
        for ranks in (2, {"first": 2}):
            with pytest.raises(ValueError, match="TwoLayers has no LowRankLinear to cut: compress it first"):
                truncate(dense, ranks)
        statistics = calibrate(dense, [x], target_modules=["first"], **QUIET)
        first = model.first
        with pytest.raises(ValueError, match="statistics have nothing of 'second'"):
            truncate(model, 2, statistics)
        assert model.first is first
        with pytest.raises(ValueError, match="has a PEFT adapter"):
            truncate(get_peft_model(model, WaRAConfig(target_modules=["first"])), 2)


class TestAllAtOnce:
    def test_a_layer_with_two_names_is_cut_under_both(self) -> None:
        _, model, _, _ = healed()
        model.again = model.first
        before = model.first.weight.detach()
        truncate(model, {"first": 2})
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        assert model.again is model.first and model.first.rank == 2
        torch.testing.assert_close(model.again.weight.detach(), left[:, :2] * values[:2] @ right[:2])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("part", ["down", "up"])
    def test_an_error_in_the_last_layer_leaves_the_first_as_it_was(self, part: str, value: float) -> None:
        _, model, _, _ = healed()
        first, second = model.first, model.second
        with torch.no_grad():
            getattr(second, part).weight[0, 0] = value
        with pytest.raises(ValueError, match=r"'second' cannot be factorised: .* NaN .* leave the layer out"):
            truncate(model, 2)
        assert model.first is first and model.second is second
        truncate(model, {"first": 2})
        assert model.first.rank == 2
