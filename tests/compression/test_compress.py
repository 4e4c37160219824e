"""Whole models compressed: identities of their layers, budgets kept, and errors before anything is changed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.compression.models import TwoLayers, batches, bert, for_causal, llama
from tests.compression.statistics.test_collect import inputs_by_hand
from wara_peft.compression import (
    SVD,
    Activation,
    ActivationFisher,
    Dictionary,
    DictionaryLinear,
    Fisher,
    LowRankLinear,
    Method,
    calibrate,
    compress,
)
from wara_peft.compression.budget.spend import ALLOCATIONS
from wara_peft.compression.methods import METHODS

KINDS = ["inputs", "gradients", "fisher"]
QUIET = {"show_progress_bar": False}


@pytest.fixture(scope="module")
def calibrated() -> tuple[nn.Module, list[dict[str, Tensor]], dict]:
    torch.manual_seed(0)
    model, data = llama(), for_causal(batches(6, labelled=False))
    return model, data, calibrate(model, data, KINDS, **QUIET)


def of_targets(model: nn.Module, names) -> int:
    """Parameters of these layers, by what is on disk, in units of float32."""
    layers = [model.get_submodule(name) for name in names]
    return sum(-(-sum(t.nbytes for t in layer.state_dict().values()) // 4) for layer in layers)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_the_docstring_names_all_allocations(name: str) -> None:
    assert f'"{name}"' in Method.__doc__


class TestBudget:
    @pytest.mark.parametrize("solver", METHODS)
    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    @pytest.mark.parametrize("budget", [0.5, 0.8])
    def test_is_kept_and_used_up(self, calibrated, solver: str, allocation: str, budget: float) -> None:
        model, _, statistics = calibrated
        model = copy.deepcopy(model)
        cost = lambda name, m, n, rank: m * n if rank is None else rank * (m + n)  # noqa: E731
        report = compress(model, METHODS[solver](budget, allocation=allocation, cost=cost), statistics, **QUIET)
        assert report.spent <= report.budget <= budget * report.before
        names = [layer.name for layer in report.layers]
        assert len(names) == (4 if allocation == "depth" else 14)
        assert report.parameters_after == of_targets(model, names)
        growing = [layer for layer in report.layers if layer.rank is not None]
        assert growing
        if allocation != "cost":
            assert report.spent == report.parameters_after
            # No single unit more fits: of a dictionary it is an atom and, every other time, a value in each row.
            sizes = [layer.shape for layer in growing]
            unit = min(m + n for m, n in sizes) if "dictionary" not in solver else min(2 * m + n for m, n in sizes)
            assert report.budget - report.spent < unit
        for layer in report.layers:
            made = model.get_submodule(layer.name)
            if layer.rank is None:
                assert type(made) is nn.Linear and layer.lost == 0 and layer.reason
            elif "dictionary" in solver:
                assert isinstance(made, DictionaryLinear) and (made.atoms, made.nonzeros) == (
                    layer.rank,
                    layer.nonzeros,
                )
            else:
                assert isinstance(made, LowRankLinear) and made.rank == layer.rank
        assert bool(model(torch.tensor([[3, 4, 5]])).logits.isfinite().all())

    @pytest.mark.parametrize(("budget", "unit"), [(3000, "parameters"), ("12KB", "bytes"), ("11KiB", "bytes")])
    def test_in_numbers(self, calibrated, budget, unit: str) -> None:
        model, _, statistics = calibrated
        report = compress(copy.deepcopy(model), Activation(budget), statistics, **QUIET)
        assert report.unit == unit
        assert report.budget == {3000: 3000, "12KB": 12000, "11KiB": 11 * 1024}[budget]
        assert 0 <= report.budget - report.spent < 32 * (4 if unit == "bytes" else 1) * 2

    def test_layers_in_which_no_rank_pays(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
        report = compress(model, SVD(0.6), **QUIET)
        assert [(layer.rank, layer.reason) for layer in report.layers] == [(4, ""), (None, "no rank pays")]
        assert type(model[1]) is nn.Linear and report.spent == 4 * 32 + 16 + 17


class TestSolutions:
    def test_the_output_error_is_what_the_report_says(self, calibrated) -> None:
        model, data, statistics = calibrated
        compressed = copy.deepcopy(model)
        report = compress(compressed, Activation(0.6), statistics, **QUIET)
        checked = 0
        for layer in report.layers:
            if layer.rank is None:
                continue
            x = inputs_by_hand(model, layer.name, data)
            weight = model.get_submodule(layer.name).weight.detach().double()
            made = compressed.get_submodule(layer.name)
            error = (x @ weight.T - (x @ made.weight.double().T + made.bias.double())).detach()
            around = (x - x.mean(0)) @ weight.T
            assert float(error.square().sum() / around.square().sum()) == pytest.approx(layer.lost, rel=1e-3)
            torch.testing.assert_close(error.mean(0), torch.zeros_like(error[0]), rtol=0, atol=1e-4)
            tail = torch.linalg.svdvals(around)[layer.rank :].square().sum() / around.square().sum()
            assert layer.lost == pytest.approx(float(tail), rel=1e-3)
            checked += 1
        assert checked > 4

    @pytest.mark.parametrize("solver", ["activation", "svd", "dictionary-oneshot"])
    def test_bias_makes_up_for_the_mean(self, solver: str) -> None:
        model = TwoLayers()
        x = torch.randn(400, 12) + 3
        statistics = calibrate(model, [x], **QUIET)
        errors = {}
        for compensate in (True, False):
            other = copy.deepcopy(model)
            compress(
                other,
                METHODS[solver](0.5, allocation="uniform", target_modules=["first"], compensate_bias=compensate),
                statistics,
                **QUIET,
            )
            errors[compensate] = float((other.first(x) - model.first(x)).square().sum())
        # The moment about zero gives the mean a direction of its own already.
        assert errors[True] < errors[False] * (0.99 if solver == "activation" else 0.9)
        other = copy.deepcopy(model)
        compress(other, METHODS[solver](0.9, allocation="uniform", compensate_bias=False), statistics, **QUIET)
        assert other.second.bias is None and torch.equal(other.first.bias, model.first.bias)

    def test_more_loss_of_weights_and_less_of_outputs_than_by_svd(self, calibrated) -> None:
        model, data, statistics = calibrated
        by = {}
        for solver in ("svd", "activation"):
            other = copy.deepcopy(model)
            compress(other, METHODS[solver](0.6, allocation="uniform"), statistics, **QUIET)
            with torch.no_grad():
                by[solver] = sum(
                    float(
                        (other(**batch).logits - model(**batch).logits)[batch["attention_mask"].bool()].square().sum()
                    )
                    for batch in data
                )
        assert by["activation"] < by["svd"]

    def test_sequential_statistics_are_those_of_the_compressed_prefix(self) -> None:
        model = TwoLayers().double()
        x = torch.randn(300, 12).double()
        statistics = calibrate(model, [x], **QUIET)
        both = {}
        for sequential in (None, [x]):
            other = copy.deepcopy(model)
            report = compress(other, Activation(0.6, allocation="uniform"), statistics, sequential=sequential, **QUIET)
            assert report.sequential is (sequential is not None)
            both[sequential is not None] = other
        hidden = torch.relu(both[True].first(x))
        torch.testing.assert_close(both[True].first(x), both[False].first(x))
        target = hidden @ model.second.weight.T
        error = (both[True].second(hidden) - target).square().sum()
        centred = (hidden - hidden.mean(0)) @ model.second.weight.T
        tail = torch.linalg.svdvals(centred)[both[True].second.rank :].square().sum()
        torch.testing.assert_close(error, tail)
        assert float((both[False].second(hidden) - target).square().sum()) > float(error) * 1.001

    def test_sequential_without_statistics_keeps_the_budget(self) -> None:
        model = TwoLayers()
        report = compress(model, SVD(0.6, allocation="uniform"), sequential=[torch.randn(300, 12)], **QUIET)
        assert report.parameters_after == of_targets(model, ["first", "second"]) <= report.budget

    def test_conv1d_and_a_layer_with_two_names(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one = Conv1D(20, 12)
                self.two = self.one

            def forward(self, x: Tensor) -> Tensor:
                return self.two(self.one(x)[..., :12])

        model = Model()
        nn.init.normal_(model.one.weight)
        x = torch.randn(200, 12)
        statistics = calibrate(model, [x], **QUIET)
        assert statistics["one"].count == 400
        weight = model.one.weight.detach().clone()
        report = compress(model, Activation(0.9), statistics, **QUIET)
        assert len(report.layers) == 1 and model.one is model.two
        assert model.one.weight.shape == (20, 12)
        error = (model.one.weight - weight.T).square().sum() / weight.square().sum()
        assert 0.01 < float(error) < 0.6

    def test_what_stays(self) -> None:
        model = bert().train().bfloat16()
        model.bert.encoder.layer[0].requires_grad_(False)
        compress(model, SVD(0.5), **QUIET)
        made = [(name, m) for name, m in model.named_modules() if isinstance(m, LowRankLinear)]
        assert made and all(module.training and module.up.weight.dtype == torch.bfloat16 for _, module in made)
        for name, module in made:
            frozen = "layer.0." in name
            assert all(parameter.requires_grad is not frozen for parameter in module.parameters())

    def test_tied_layers_stay(self) -> None:
        model = llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        report = compress(model, SVD(0.5, target_modules=["lm_head", "up_proj"]), **QUIET)
        assert list(report.left) == ["lm_head"] and "tied" in report.left["lm_head"]
        assert len(report.layers) == 2

    def test_factors_are_not_compressed_again(self) -> None:
        model = llama()
        compress(model, SVD(0.5, target_modules=["up_proj"]), **QUIET)
        kept = model.model.layers[0].mlp.up_proj
        report = compress(model, SVD(0.5, target_modules=["down_proj"]), **QUIET)
        assert [layer.name.rpartition(".")[2] for layer in report.layers] == ["down_proj"] * 2
        assert model.model.layers[0].mlp.up_proj is kept and type(kept.down) is nn.Linear
        names = calibrate(model, batches(4, labelled=False), **QUIET).keys()
        assert len(names) == 14 - 4 and not any("up_proj" in name for name in names)


class TestCosts:
    @pytest.mark.parametrize("cost", ["flops", "bytes"])
    def test_the_budget_is_a_share_of_the_cost(self, calibrated, cost: str) -> None:
        model, _, statistics = calibrated
        report = compress(copy.deepcopy(model), Activation(0.9, allocation="cost", cost=cost), statistics, **QUIET)
        assert report.unit == cost
        assert 0 < report.spent <= report.budget * (1 + 1e-12) and report.budget <= 0.9 * report.before

    def test_flops_count_the_positions_that_a_layer_sees(self, calibrated) -> None:
        model, _, statistics = calibrated
        name = "model.layers.0.mlp.up_proj"
        report = compress(
            copy.deepcopy(model), Activation(0.5, allocation="cost", target_modules=[name]), statistics, **QUIET
        )
        assert report.before == 2 * 6 * 24 * 16 * 32

    def test_an_expensive_layer_gets_less(self, calibrated) -> None:
        model, _, statistics = calibrated
        ranks = {}
        for price in (1, 5):

            def cost(name: str, m: int, n: int, rank: int | None, price: int = price) -> float:
                of_name = price if "layers.0" in name else 1
                return of_name * (m * n if rank is None else rank * (m + n))

            report = compress(copy.deepcopy(model), Activation(0.6, allocation="cost", cost=cost), statistics, **QUIET)
            ranks[price] = sum(layer.parameters_after for layer in report.layers if "layers.0" in layer.name)
        assert ranks[5] < ranks[1]


@pytest.mark.parametrize(
    ("budget", "plain"), [(np.float32(0.5), 0.5), (np.float64(0.5), 0.5), (np.int64(400), 400), (np.int16(400), 400)]
)
def test_numbers_of_numpy(budget: Any, plain: float) -> None:
    reports = []
    for value in (budget, plain):
        torch.manual_seed(3)
        reports.append(compress(TwoLayers(), SVD(value), **QUIET))
    assert reports[0] == reports[1]
    assert type(reports[0].budget) is int


def test_ranks_that_are_no_ints() -> None:
    for value in (True, np.float32(2), 2.0):
        with pytest.raises(TypeError, match=r"rank=.* of 'first' must be an int from 1 to 12"):
            compress(TwoLayers(), SVD({"first": value}), **QUIET)
    assert compress(TwoLayers(), SVD({"first": np.int64(2)}), **QUIET).layers[0].rank == 2


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"allocation": "even"}, "allocation='even' is unknown"),
            ({"cost": "joules"}, "cost='joules' is unknown"),
            ({"budget": 1.5}, "budget=1.5 must be a share"),
            ({"budget": 0}, "budget=0 must be"),
            ({"budget": True}, "budget=True must be"),
            ({"budget": float("nan")}, "budget=nan must be"),
            ({"budget": np.float32(1.5)}, r"budget=np\.float32\(1\.5\) must be a share"),
            ({"budget": {}}, r"budget=\{\} must map the full name of at least one layer"),
            ({"budget": {0: 3}}, r"budget=\{0: 3\} must map the full name"),
            ({"budget": "much"}, "budget='much' must be a share such as"),
            ({"budget": "1KB", "allocation": "cost"}, "cannot be one where flops are counted"),
            ({"budget": 100}, r"budget of 100 parameters is less than \d+, the least"),
            ({"budget": 1e-6}, r"budget of 0 parameters is less than \d+, the least"),
            ({"statistics": None}, "Activation needs statistics: pass calibrate"),
            ({"statistics": {}}, "nothing of 'model.layers.0.self_attn.q_proj', but of no layer"),
            ({"target_modules": ["q"]}, "'q' matches no"),
            ({"sequential": []}, "sequential gives no batches"),
            ({"method": Dictionary, "iterations": -1}, "iterations=-1 must be an int of at least 0"),
            ({"method": ActivationFisher, "damping": 0}, "damping=0 must be a finite number above 0"),
            ({"method": Fisher, "statistics": "inputs"}, "'model.layers.0.self_attn.q_proj' have no 'fisher'"),
            ({"statistics": "other"}, "'model.layers.0.self_attn.q_proj' are of a layer with other weights, .*%"),
            ({"statistics": "wider"}, r"'model.layers.0.self_attn.q_proj' .* shape \(24, 24\), not \(16, 16\)"),
            ({"statistics": "nan"}, "The moment of 'model.layers.1.mlp.up_proj' is not finite"),
            ({"statistics": "silent"}, "'model.layers.1.mlp.up_proj' never ran during calibration"),
            (
                {"statistics": "flat", "method": ActivationFisher},
                "gradients of 'model.layers.1.mlp.up_proj' are zero",
            ),
        ],
    )
    def test_nothing_is_changed(self, calibrated, arguments: dict, message: str) -> None:
        model, data, statistics = calibrated
        name = "model.layers.1.mlp.up_proj"
        entry = statistics[name]
        nan = entry.moment.clone()
        nan[2, 3] = torch.nan
        wide = llama()
        wide.model.layers[0].self_attn.q_proj = nn.Linear(24, 24)
        other = replace(statistics["model.layers.0.self_attn.q_proj"], shape=(24, 24))
        changed = {
            "inputs": lambda: {key: replace(value, fisher=None) for key, value in statistics.items()},
            "other": lambda: calibrate(llama(), data, **QUIET),
            "wider": lambda: {**statistics, "model.layers.0.self_attn.q_proj": other},
            "nan": lambda: {**statistics, name: replace(entry, moment=nan)},
            "silent": lambda: {**statistics, name: replace(entry, count=0)},
            "flat": lambda: {**statistics, name: replace(entry, gradients=torch.zeros(32, 32))},
        }
        given = {"budget": 0.5, "statistics": statistics, **arguments}
        method = given.pop("method", Activation)
        if isinstance(given["statistics"], str):
            given["statistics"] = changed[given["statistics"]]()
        modules = dict(model.named_modules())
        with pytest.raises(ValueError, match=message):
            fields = {key: given.pop(key) for key in list(given) if key in method.__dataclass_fields__}
            compress(model, method(**fields), **given, **QUIET)
        assert dict(model.named_modules()) == modules and not hasattr(model, "compression_report")

    def test_a_layer_that_never_runs(self) -> None:
        model = TwoLayers()
        model.spare = nn.Linear(12, 12)
        statistics = calibrate(model, torch.randn(3, 40, 12), **QUIET)
        assert statistics["spare"].count == 0
        with pytest.raises(ValueError, match="'spare' never ran during calibration, in 0 positions"):
            compress(model, Activation(0.5), statistics, **QUIET)
        assert type(model.first) is nn.Linear
        with pytest.raises(ValueError, match="'spare' never ran in the first batch"):
            compress(model, SVD(0.5, allocation="uniform"), statistics, sequential=torch.randn(3, 40, 12), **QUIET)
        assert type(model.first) is nn.Linear

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_weights_that_are_not_finite(self, value: float) -> None:
        model = TwoLayers()
        with torch.no_grad():
            model.second.weight[1, 1] = value
        with pytest.raises(ValueError, match=r"'second' cannot be factorised: .*NaN or infinity"):
            compress(model, SVD(0.5), **QUIET)
        assert type(model.first) is nn.Linear

    def test_a_failure_half_way_through_sequential_compression(self) -> None:
        model = TwoLayers()
        first = model.first
        calls = []

        def fails_later(model: nn.Module, batch: Tensor) -> Tensor:
            calls.append(type(model.first))
            if len(calls) == 3:
                raise RuntimeError("stop")
            return model(batch).sum()

        with pytest.raises(RuntimeError, match="stop"):
            compress(model, SVD(0.5), sequential=[torch.randn(30, 12)], loss_fn=fails_later, **QUIET)
        assert calls[-1] is LowRankLinear and model.first is first
