"""Variants of `grid` that benchmarks/quality/grid_variants.py compares: equal parameters, and what their names say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from quality import grid_variants as variants  # noqa: E402
from quality.cells import Cell  # noqa: E402
from quality.plan import TUNING_SEEDS, Results  # noqa: E402
from quality.sizes import adapter_size  # noqa: E402
from quality.tasks.digits import Digits  # noqa: E402
from quality.tasks.planted import SPATIAL, Planted  # noqa: E402
from quality.training import train  # noqa: E402

from wara_peft.layer import WaRALayer  # noqa: E402

NAMES = [variants.GRID, *[variant.name for variant in variants.VARIANTS]]
DETAILS_ALONE = (
    "beside LoRA r=2: ad1, da1",
    "beside LoRA r=1: details",
    "beside LoRA r=1: details that start at 0.5",
)
MLP = ("mlp.fc1", "mlp.fc2")


def layer_of(model: Any) -> WaRALayer:
    return next(module for module in model.modules() if isinstance(module, WaRALayer))


@pytest.mark.parametrize("name", NAMES)
def test_as_many_parameters_as_lora_and_all_of_them_learn(name: str) -> None:
    problem = Digits(8, "clean", 8, 2, pretraining_epochs=1).problem(0)
    rows = {"pixel_values": problem.splits["test"]["pixel_values"][:4]}
    size = adapter_size(problem, LoraConfig(r=4))
    with torch.no_grad():
        expected = problem.model.eval()(**rows).logits
    built = variants.METHODS_HERE[name].build(problem, 4.0)
    assert built.parameters == size
    with torch.no_grad():
        assert torch.equal(built.model.eval()(**rows).logits, expected)
    # B starts at zero. Of the last layer the class token alone is read, which has no detail bands.
    assert train(problem, built, 0.1)
    still = {
        f"{layer.module_name}, {adapter}"
        for layer in built.model.modules()
        if isinstance(layer, WaRALayer)
        for adapter, factor in layer.wara_B.items()
        if not any(columns.any() for columns in factor.parameters())
    }
    unread = {f"vit.layers.2.{module}, part1" for module in ("attention.q_proj", "attention.o_proj", *MLP)}
    assert still == (unread if name in DETAILS_ALONE else set())


@pytest.mark.parametrize("prepare", [None, variants.whole_prefix])
def test_pairs_of_details_learn_from_the_class_token_where_prefix_tokens_have_all_bands(prepare: Any) -> None:
    problem = Digits(8, "clean", 8, 2, pretraining_epochs=1).problem(0)
    built = variants.one("prefix", prepare).build(problem, 4.0)
    assert train(problem, built, 0.1)
    last = built.model.get_submodule("base_model.model.vit.layers.2.mlp.fc2").wara_B["part0"].weight
    assert last.any(0).tolist() == [True, *[prepare is not None] * 3]


@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_slower_details_take_a_part_of_each_step(factor: float) -> None:
    built = variants.one("slower", variants.slower_details(factor)).build(Planted(SPATIAL, 2).problem(0), 4.0)
    layer = layer_of(built.model)
    a, b = layer.wara_A["part0"].weight, layer.wara_B["part0"].weight
    first = a.detach().clone()
    shares = torch.tensor([1.0, factor, factor, factor])
    for step in (0, 1):
        with torch.no_grad():
            a += 1.0
            b += 2.0
        built.after_step(step)
    torch.testing.assert_close(a.detach() - first, (2 * shares[:, None]).expand_as(a))
    torch.testing.assert_close(b.detach(), (4 * shares).expand_as(b))


def test_details_that_start_small() -> None:
    found = []
    for prepare in (None, variants.smaller_details(0.25)):
        torch.manual_seed(0)
        built = variants.one("small", prepare).build(Planted(SPATIAL, 2).problem(0), 4.0)
        found.append(layer_of(built.model).wara_A["part0"].weight.detach())
    assert torch.equal(found[1], found[0] * torch.tensor([1.0, 0.25, 0.25, 0.25])[:, None])


def test_whole_prefix_is_lora_on_prefix_tokens_and_grid_on_patches() -> None:
    layers = []
    for prepare in (None, variants.whole_prefix):
        problem = Digits(8, "clean", 8, 2, pretraining_epochs=1).problem(0)
        torch.manual_seed(0)
        layers.append(layer_of(variants.one("prefix", prepare).build(problem, 4.0).model))
        torch.nn.init.normal_(layers[-1].wara_B["part0"].weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 65, 64)
    with torch.no_grad():
        plain, whole = (layer(x) for layer in layers)
        a, b = (factor["part0"].weight for factor in (layers[1].wara_A, layers[1].wara_B))
        lora = layers[1].base_layer(x) + x @ a.T @ b.T
    torch.testing.assert_close(whole[:, :1], lora[:, :1])
    torch.testing.assert_close(whole[:, 1:], plain[:, 1:])
    assert not torch.allclose(whole[:, :1], plain[:, :1])


class TestPlan:
    """What is run next, with made-up results in which every other variant is far below `grid`."""

    def results(self, seeds: tuple[int, ...]) -> Results:
        values = {name: (0.8 if number % 2 else 0.5) for number, name in enumerate(NAMES)}
        values |= {variants.GRID: 0.78, NAMES[1]: 0.79, NAMES[3]: 0.9}
        names = list(variants.METHODS_HERE)
        return {
            cell: {"validation": values.get(name, 0.7) - (cell.rate != 0.01) * 0.1, "test": 0.0}
            for name in names
            for seed in seeds
            for cell in variants.tuning_cells(name, seed)
        }

    def test_losers_get_no_second_seed(self) -> None:
        assert {cell.seed for cell in variants.pending({})} == {TUNING_SEEDS[0]}
        cells = variants.pending(self.results(TUNING_SEEDS[:1]))
        assert {cell.seed for cell in cells} == {TUNING_SEEDS[1]}
        losers = {name for number, name in enumerate(NAMES) if number % 2 == 0 and number}
        assert {cell.method for cell in cells} == set(variants.METHODS_HERE) - losers

    def test_the_best_two_are_confirmed_at_the_rate_of_validation(self) -> None:
        cells = variants.pending(self.results(TUNING_SEEDS))
        methods = [variants.GRID, NAMES[3], NAMES[5], "LoRA", "WaveFT"]
        spatial = f"planted/{SPATIAL}"
        assert {cell.seed for cell in cells} == set(variants.SEEDS)
        assert {cell.method for cell in cells} == set(methods)
        assert {cell.rate for cell in cells if cell.task != spatial} == {0.01}
        done = self.results(TUNING_SEEDS) | {cell: {"validation": 0.0, "test": 0.5} for cell in cells}
        assert variants.pending(done) == []
        row = f"| {spatial} | {variants.GRID} |"
        assert row in variants.test_table(done)

    def test_cells_of_planted_filters_are_asked_of_one_layer_variants_alone(self) -> None:
        tasks = {cell.method: set() for cell in variants.pending({})}
        for cell in variants.pending({}):
            assert isinstance(cell, Cell)
            tasks[cell.method].add(cell.task)
        assert len(tasks[variants.GRID]) == 3
        assert len(tasks["MLPs only, LoRA on attention"]) == 2
