"""Variants of `grid` that benchmarks/quality/grid_variants.py compares: equal parameters, and what their names say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from quality import grid_variants as variants  # noqa: E402
from quality.cells import Cell  # noqa: E402
from quality.methods import LORA  # noqa: E402
from quality.plan import TUNING_SEEDS  # noqa: E402
from quality.sizes import adapter_size  # noqa: E402
from quality.tasks.digits import Digits  # noqa: E402
from quality.tasks.planted import SPATIAL, Planted  # noqa: E402
from quality.training import train  # noqa: E402

from wara_peft.layers.base import WaRALayer  # noqa: E402

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
    """What is run next, with made-up results."""

    best = ("db2", "2 levels", "3 levels")

    def results(self, cells: list[Cell]) -> dict[Cell, dict[str, Any]]:
        """Validation is best for these three, in this order, and at a rate of 0.01."""
        values = {name: 0.9 - 0.01 * place for place, name in enumerate(self.best)}
        return {
            cell: {"validation": values.get(cell.method, 0.7) - 0.1 * (cell.rate != 0.01), "test": 0.5}
            for cell in cells
        }

    def test_steps(self) -> None:
        looks = variants.pending({})
        assert {(cell.rate, cell.seed) for cell in looks} == {(0.01, TUNING_SEEDS[0])}
        assert {cell.method for cell in looks} == {variant.name for variant in variants.VARIANTS}
        assert len(looks) == 2 * len(variants.VARIANTS)

        results = self.results(looks)
        rates = variants.pending(results)
        kept = self.best[: variants.KEPT]
        assert {cell.method for cell in rates} == {variants.GRID, LORA, *kept}
        assert {(cell.rate, cell.seed) for cell in rates if cell.method == LORA} == {
            (rate, seed) for rate in (0.003, 0.01, 0.03) for seed in TUNING_SEEDS
        }

        results |= self.results(rates)
        reported = variants.pending(results)
        assert {cell.method for cell in reported} == {variants.GRID, *kept}
        assert {cell.seed for cell in reported} == set(variants.SEEDS)
        assert not {cell.seed for cell in reported} & set(TUNING_SEEDS)
        assert {cell.rate for cell in reported if cell.task.startswith("digits")} == {0.01}

        results |= self.results(reported)
        for method in (LORA, "WaveFT", "WaveFT"):
            cells = variants.pending(results)
            assert {cell.method for cell in cells} == {method}
            results |= self.results(cells)
        assert variants.pending(results) == []

    def test_tables(self) -> None:
        results: dict[Cell, dict[str, Any]] = {}
        while cells := variants.pending(results):
            results |= self.results(cells)
        assert "| db2 | 90.0 | 90.0 (0.01) | 90.0 (0.01) |" in variants.tuning_table(results)
        for cell in results:  # eight seeds of grid, and the others one or two points above it
            results[cell]["test"] = 0.01 * (cell.seed + (cell.method != variants.GRID) * (1 + cell.seed % 2))
        table = variants.test_table(results)
        task = variants.DIGITS[0].name
        assert f"| {task} | grid | 0.01 | 3.5 ± 2.0 |  |  | 8 |" in table  # t(7) √6 / √8 = 2.05
        assert f"| {task} | db2 | 0.01 | 5.0 ± 2.2 | +1.5 ± 0.4 | 0.000 | 8 |" in table
