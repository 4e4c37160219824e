"""The methods of the quality suite: as many parameters as LoRA, and each of them what its name says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from quality.methods import METHODS, RULES
from quality.sizes import adapter_size, largest, wara_ladder
from quality.tasks.digits import Digits
from quality.tasks.planted import Planted
from quality.training import Built, train, trained_parameters

from wara_peft.layers.base import WaRALayer

SIZED = [name for name, method in METHODS.items() if method.sized and method.group != "rule"]


class TestMethods:
    problem = Digits(8, "clean", 8, 3, pretraining_epochs=1)

    def test_ladder_fills_coarse_levels_first(self) -> None:
        assert wara_ladder(1, 6) == {"aa1": 2, "dd1": 2, "ad1": 1, "da1": 1}
        assert wara_ladder(2, 5) == {"aa2": 1, "dd2": 1, "ad2": 1, "da2": 1, "dd1": 1, "ad1": 0, "da1": 0}

    @pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 7, 8, 100])
    def test_largest_size(self, limit: int) -> None:
        assert largest(lambda size: size <= limit) == limit

    @pytest.mark.slow
    @pytest.mark.parametrize("budget", [1.0, 4.0])
    @pytest.mark.parametrize("name", SIZED)
    def test_methods_are_matched_to_loras_parameters(self, name: str, budget: float) -> None:
        problem = self.problem.problem(0)
        # Layers of the ViT: three, each with four of 64 × 64, one of 64 × 128 and one of 128 × 64.
        lora = int(budget) * 3 * (4 * 128 + 2 * 192)
        assert adapter_size(problem, LoraConfig(r=int(budget))) == lora
        built = METHODS[name].build(problem, budget)
        if built is None:
            assert (name, budget) in {("DoRA", 1.0), ("low-rank attention", 1.0), ("GraLoRA", 1.0)}
            return
        assert built.parameters <= 1.04 * lora
        # A tiny core grows by whole squares, DoRA by ranks that cost a quarter, VeRA by vectors.
        assert built.parameters >= (0.85 if budget == 4 else 0.6) * lora
        if name != "AdaLoRA" and "while training" not in name:  # which train more
            assert trained_parameters(built.model, problem.head) == built.parameters
        head = [p for n, p in built.model.named_parameters() if p.requires_grad and "classifier" in n]
        assert sum(p.numel() for p in head) == 64 * 5 + 5

    @pytest.mark.slow
    def test_ends(self) -> None:
        problem = self.problem.problem(0)
        assert METHODS["frozen"].build(problem, 0).parameters == 0
        trained = {name for name, p in problem.model.named_parameters() if p.requires_grad}
        assert trained == {"classifier.weight", "classifier.bias"}
        problem = self.problem.problem(0)
        whole = sum(p.numel() for p in problem.model.parameters())
        assert METHODS["full fine-tuning"].build(problem, 0).parameters == whole - 64 * 5 - 5

    def test_low_rank_attention_of_full_rank_and_linformer_start_from_the_weights(self) -> None:
        problem = self.problem.problem(0)
        rows = {"pixel_values": problem.splits["test"]["pixel_values"][:4]}
        with torch.no_grad():
            expected = problem.model.eval()(**rows).logits
            replaced = METHODS["low-rank attention"].replace(problem, problem.model, 64).eval()
            assert torch.allclose(replaced(**rows).logits, expected, atol=1e-5)
        problem = self.problem.problem(0)
        weight = problem.model.vit.layers[1].attention.k_proj.weight.clone()
        replaced = METHODS["Linformer"].replace(problem, problem.model, 7)
        assert torch.equal(replaced.vit.layers[1].attention.attention.k_proj.weight, weight)
        assert trained_parameters(replaced, problem.head) == 3 * 2 * 65 * 7

    def test_adalora_is_cut_to_its_rank(self) -> None:
        problem = Planted("low-rank", 60).problem(0)
        built = METHODS["AdaLoRA"].build(problem, 4.0)
        assert train(problem, built, 0.03)
        values = next(p for name, p in built.model.named_parameters() if "lora_E" in name)
        assert (len(values), int(values.count_nonzero())) == (6, 4)

    def test_eva_looks_at_the_data(self) -> None:
        problem = Planted("low-rank", 10).problem(0)
        batch = next(problem.batches())["inputs"]
        built = METHODS["LoRA, EVA"].build(problem, 1.0)
        rows = next(p for name, p in built.model.named_parameters() if "lora_A" in name)
        random = torch.randn(100, 64)
        share = (batch @ rows[0] / rows[0].norm()).square().mean()
        assert share > 1.2 * (random @ rows[0] / rows[0].norm()).square().mean()

    @pytest.mark.parametrize("name", RULES)
    def test_the_rule_scales_alone(self, name: str) -> None:
        plain, scaled = (METHODS[of].build(Planted("random", 2).problem(0), 4.0) for of in (name, RULES[name]))
        configs = [built.model.peft_config["default"] for built in (plain, scaled)]
        factor = 2 if configs[0].levels == 3 else 1 / 0.7
        layers = [built.model.base_model.model.layer for built in (plain, scaled)]
        assert [layer.scaling["default"] for layer in layers] == pytest.approx([1, factor])
        assert configs[0].subband_ranks == configs[1].subband_ranks and plain.parameters == scaled.parameters


class TestRanks:
    """The ways to spread a budget over modules; parameters are compared with LoRA's above."""

    digits = Digits(8, "clean", 8, 3, pretraining_epochs=1)

    def ranks(self, name: str, budget: float, seed: int = 0) -> dict[str, dict[str, int]]:
        """By module the ranks of its subbands, LoRA's as that of the undecomposed matrix."""
        built = METHODS[name].build(self.digits.problem(seed), budget)
        found = {}
        for module_name, module in built.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                wara = isinstance(module, WaRALayer)
                bands = module.forms["default"].coefficients(module.parts("default")) if wara else {}
                ranks = {band: len(rows) for band, (rows, _) in bands.items()}
                found[module_name.partition("vit.")[2]] = ranks if wara else {"aa0": module.r["default"]}
        return found

    def test_over_modules_a_rank_becomes_half_of_it_in_every_subband(self) -> None:
        lora = self.ranks("LoRA, ranks by gradient", 4.0)
        wara = self.ranks("WaRA subband, ranks by gradient over modules", 4.0)
        assert lora.keys() == wara.keys() and len({ranks["aa0"] for ranks in lora.values()}) > 2
        for name, ranks in wara.items():
            rank = lora[name]["aa0"]
            assert ranks == {band: size for band, size in wara_ladder(1, 2 * rank).items() if size}

    def test_over_subbands_they_differ_within_a_module(self) -> None:
        wara = self.ranks("WaRA subband, ranks by gradient", 16.0)
        assert any(max(ranks.values()) > min(ranks.values()) for ranks in wara.values())

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["LoRA, ranks while training", "WaRA subband, ranks while training"])
    def test_while_training_it_comes_down_to_the_budget(self, name: str) -> None:
        problem = Digits(8, "clean", 8, 20, pretraining_epochs=1).problem(0)
        built = METHODS[name].build(problem, 4.0)
        assert trained_parameters(built.model, problem.head) == 1.5 * built.parameters
        assert train(problem, built, 0.01)
        left = 0
        for layer in (layer for layer in built.model.modules() if isinstance(layer, WaRALayer)):
            for rows, columns in layer.forms["default"].coefficients(layer.parts("default")).values():
                left += int(columns.any(0).sum()) * (rows.shape[1] + len(columns))
        assert 0.95 * built.parameters < left <= built.parameters

    @pytest.mark.slow
    def test_evas_ranks_follow_the_inputs(self) -> None:
        ranks = {of["aa0"] for of in self.ranks("LoRA, EVA's ranks", 4.0).values()}
        assert len(ranks) > 1 and max(ranks) <= 8

    @pytest.mark.slow
    def test_controls(self) -> None:
        first = self.ranks("LoRA, first layer alone", 2.0)
        assert len(first) == 6 and all(name.startswith("layers.0.") for name in first)
        assert all(of == {"aa0": 6} for of in first.values())
        one, same, other = (self.ranks("LoRA, random ranks", 4.0, seed) for seed in (0, 0, 1))
        assert one == same != other


class TestTraining:
    def test_a_run_that_diverges_is_told(self) -> None:
        problem = Planted("random", 5).problem(0)
        assert not train(problem, Built(problem.model, 0), float("inf"))

    def test_least_squares_is_found(self) -> None:
        problem = Planted("random", 300).problem(0)
        assert train(problem, METHODS["full fine-tuning"].build(problem, 0), 0.01)
        assert problem.score(problem.model, problem.splits["test"]) < 0.1
