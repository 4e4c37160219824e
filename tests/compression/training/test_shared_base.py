"""Shared bases: exact at full rank, the SVD's error below it, one parameter for all, and sparse for good."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.compression.models import batches, llama
from wara_peft import WaRAConfig
from wara_peft.compression import (
    SharedBaseLinear,
    calibrate,
    load_compressed,
    minimise_block_errors,
    save_compressed,
    share_bases,
    to_dense,
)
from wara_peft.compression.statistics.layer_statistics import LayerStatistics
from wara_peft.compression.training.shared_base import cubic_sparsity, prune_together, shared_rank


class Blocks(nn.Module):
    """Two residual blocks of an MLP, of width 8 and 32, and a layer of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8, bias=False)}) for _ in range(2)
        )
        self.other = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["fc2"](torch.relu(block["fc1"](x)))
        return x


GROUP = [f"blocks.{index}.{name}" for index in (0, 1) for name in ("fc1", "fc2")]


def model_of() -> Blocks:
    return Blocks().double()


def together(model: nn.Module) -> Tensor:
    return torch.cat(
        [model.get_submodule(n).weight.T if "fc1" in n else model.get_submodule(n).weight for n in GROUP], 1
    )


def test_rank_of_the_papers_example() -> None:
    assert shared_rank(768, 4 * 768 * 2 * 4, 0.25, 0.75) == 682
    assert shared_rank(8, 128, 0.99, 0.75) == 8


@pytest.mark.parametrize("budget", [0.99, 0.5])
def test_error_is_the_tail_and_full_rank_is_exact(budget: float) -> None:
    model, x = model_of(), torch.randn(6, 8, dtype=torch.float64)
    before, expected, bias = together(model).detach(), model(x), model.blocks[0]["fc1"].bias
    # At a sparsity of 0.5 the budget is enough for all ranks.
    (rank,) = share_bases(model, [GROUP], budget, 0.5 if budget == 0.99 else 0.0)
    assert rank == (8 if budget == 0.99 else int(8 * 128 * 0.5 / 136))
    tail = torch.linalg.svdvals(before)[rank:].square().sum()
    torch.testing.assert_close((together(model) - before).square().sum().detach(), tail, atol=1e-20, rtol=1e-9)
    if rank == 8:
        torch.testing.assert_close(model(x), expected)
    else:
        base = model.blocks[0]["fc1"].base
        numbers = sum({id(p): p.numel() for n in GROUP for p in (base, model.get_submodule(n).values)}.values())
        assert numbers <= budget * 8 * 128 < numbers + 136
    assert model.blocks[0]["fc1"].bias is bias and model.blocks[0]["fc2"].bias is None


def test_one_parameter_to_which_gradients_add_up() -> None:
    model, x = model_of(), torch.randn(6, 8, dtype=torch.float64)
    share_bases(model, [GROUP], 0.5)
    layers = [model.get_submodule(name) for name in GROUP]
    assert all(layer.base is layers[0].base for layer in layers)
    assert sum(parameter is layers[0].base for parameter in model.parameters()) == 1
    apart = copy.deepcopy(model)
    for name in GROUP:
        layer = apart.get_submodule(name)
        layer.base = nn.Parameter(layer.base.detach().clone())
    for one in (model, apart):
        one(x).square().sum().backward()
    expected = sum(apart.get_submodule(name).base.grad for name in GROUP)
    torch.testing.assert_close(layers[0].base.grad, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_the_weights(transposed: bool) -> None:
    layer = SharedBaseLinear(nn.Parameter(torch.randn(6, 3, dtype=torch.float64)), 11, transposed)
    nn.init.normal_(layer.values)
    nn.init.normal_(layer.bias)
    layer.prune(torch.rand(33) < 0.5)
    x = torch.randn(2, 4, layer.in_features, dtype=torch.float64)
    product = layer.base @ layer.coefficients
    torch.testing.assert_close(layer(x), x @ (product if transposed else product.T) + layer.bias)
    assert layer.weight.shape == (layer.out_features, layer.in_features)
    assert int((layer.coefficients != 0).sum()) == len(layer.values) < 33
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16
    other = SharedBaseLinear(nn.Parameter(torch.zeros(6, 3)), 11, transposed)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


def test_what_is_pruned_stays_zero_and_moments_follow() -> None:
    model, x = model_of(), torch.randn(6, 8, dtype=torch.float64)
    share_bases(model, [GROUP], 0.5)
    layers = [model.get_submodule(name) for name in GROUP]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    magnitudes = torch.cat([layer.values.detach().abs() for layer in layers])
    first = layers[0].values.detach().clone(), optimizer.state[layers[0].values]["exp_avg"].clone()
    prune_together(layers, 0.75, optimizer)
    # Those that are left are the largest of all layers together.
    threshold = magnitudes.sort().values[-round(0.25 * len(magnitudes))]
    assert sum(len(layer.values) for layer in layers) == round(0.25 * len(magnitudes))
    assert all(bool((layer.values.abs() >= threshold).all()) for layer in layers)
    kept = first[0].abs() >= threshold
    assert torch.equal(layers[0].values, first[0][kept])
    assert torch.equal(optimizer.state[layers[0].values]["exp_avg"], first[1][kept])
    zeros = [layer.coefficients == 0 for layer in layers]
    for _ in range(3):
        step()
    assert all(torch.equal(layer.coefficients == 0, zero) for layer, zero in zip(layers, zeros, strict=True))


def test_basis_sharing_is_best_in_the_sum_and_fitted_in_each() -> None:
    model = llama().double()
    names = [f"model.layers.{index}.mlp.up_proj" for index in (0, 1)]
    statistics = calibrate(model, batches(6, labelled=False), target_modules=["up_proj"], show_progress_bar=False)
    weights = [model.get_submodule(name).weight.detach().clone() for name in names]
    moments = [statistics[name].moment.double() for name in names]
    (rank,) = share_bases(model, [names], 0.6, statistics=statistics)
    layers = [model.get_submodule(name) for name in names]
    assert all(layer.base is layers[0].base and layer.transposed for layer in layers)
    values, vectors = torch.linalg.eigh(moments[0] + moments[1])
    root = vectors * values.clamp(min=0).sqrt()
    spectrum = torch.linalg.svdvals(torch.cat(weights) @ root)
    # The base spans what the first right singular vectors do, in the metric of the sum.
    base = layers[0].base.detach()
    projected = torch.cat(weights) @ root
    inside = torch.linalg.qr(root.T @ base).Q
    left = projected - projected @ inside @ inside.T
    torch.testing.assert_close(left.square().sum(), spectrum[rank:].square().sum(), rtol=1e-6, atol=0)
    for layer, weight, moment in zip(layers, weights, moments, strict=True):
        lost = weight - layer.weight.detach()
        # Nothing that coefficients could still take away, and no more than by those of the sum.
        torch.testing.assert_close(lost @ moment @ base, torch.zeros(32, rank, dtype=torch.float64), atol=1e-9, rtol=0)
        of_sum = weight @ root @ inside @ inside.T @ torch.linalg.inv(root)
        other = weight - of_sum
        assert float((lost @ moment * lost).sum()) <= float((other @ moment * other).sum()) * (1 + 1e-9)


def test_cubic_rule() -> None:
    assert [cubic_sparsity(progress, 0.05, 0.75) for progress in (0.0, 1.0, 2.0)] == pytest.approx([0.05, 0.75, 0.75])
    assert cubic_sparsity(0.5, 0.05, 0.75) == pytest.approx(0.75 - 0.7 / 8)


def test_block_errors_fall_and_sparsity_is_reached() -> None:
    model = llama()
    reference = copy.deepcopy(model)
    names = [f"model.layers.{index}.mlp.{part}" for index in (0, 1) for part in ("up_proj", "down_proj")]
    share_bases(model, [names], 0.5, 0.5)
    data = batches(3, labelled=False)
    others = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if "mlp.up" not in name and "down" not in name
    }
    blocks = ["model.layers.0", "model.layers.1"]
    losses = minimise_block_errors(model, reference, blocks, data, epochs=30, lr=3e-3, sparsity=0.5, interval=5)
    layers = [module for module in model.modules() if isinstance(module, SharedBaseLinear)]
    assert sum(len(layer.values) for layer in layers) == round(
        0.5 * sum(layer.rank * layer.columns for layer in layers)
    )
    pruned = copy.deepcopy(reference)
    share_bases(pruned, [names], 0.5, 0.5)
    prune_together([module for module in pruned.modules() if isinstance(module, SharedBaseLinear)], 0.5)
    untrained = minimise_block_errors(pruned, reference, blocks, data, epochs=1, lr=0.0)
    assert len(losses) == 30 and losses[-1] < 0.7 * untrained[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())
    with torch.no_grad():
        expected = model(**data[0]).logits
        assert sorted(to_dense(model)) == sorted(names)
        torch.testing.assert_close(model(**data[0]).logits, expected, rtol=1e-4, atol=1e-5)


def test_saved_once_and_loaded_as_one_parameter(tmp_path: Path) -> None:
    model = llama()
    groups = [
        [f"model.layers.{index}.mlp.{part}" for index in (0, 1)] for part in ("up_proj", "gate_proj", "down_proj")
    ]
    share_bases(model, groups[:2], 0.6, 0.5)
    share_bases(model, groups[2:], 0.6, 0.5)
    layers = [model.get_submodule(name) for group in groups for name in group]
    prune_together(layers, 0.5)
    save_compressed(model, tmp_path / "a")
    keys = [key for key in load_file(tmp_path / "a" / "model.safetensors") if key.endswith("base")]
    assert len(keys) == 3
    loaded = load_compressed(tmp_path / "a")
    batch = batches(1, labelled=False)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    for group in groups:
        one, other = (loaded.get_submodule(name) for name in group)
        assert one.base is other.base and len(one.values) < one.rank * one.columns
    assert len({id(loaded.get_submodule(group[0]).base) for group in groups}) == 3
    model.model.layers[0].mlp.up_proj.support[0, 0] ^= 1
    save_compressed(model, tmp_path / "b")
    with pytest.raises(ValueError, match=r"support of 'model\.layers\.0\.mlp\.up_proj' has \d+ places for \d+ values"):
        load_compressed(tmp_path / "b")


@pytest.mark.parametrize("config", [LoraConfig, WaRAConfig])
def test_adapters_are_refused_by_name(config: type) -> None:
    model = model_of()
    share_bases(model, [GROUP], 0.5)
    with pytest.raises((ValueError, TypeError), match="SharedBaseLinear"):
        get_peft_model(model, config(target_modules=["fc1"]))


BROKEN = {GROUP[0]: LayerStatistics((16, 8), 4, torch.zeros(1), moment=torch.full((8, 8), torch.nan))}


@pytest.mark.parametrize(
    ("groups", "fields", "message"),
    [
        ([GROUP], {"budget": 1.0}, r"budget=1\.0 must be between 0 and 1"),
        ([GROUP], {"budget": 0.5, "sparsity": 1.0}, r"sparsity=1\.0 at least 0 and below 1"),
        ([GROUP], {"budget": 0.001}, r"budget=0\.001 is below rank 1 of the group of 'blocks\.0\.fc1'"),
        ([[*GROUP, "nothing"]], {"budget": 0.5}, "each once: 'nothing'"),
        ([GROUP, GROUP[:1]], {"budget": 0.5}, "each once"),
        ([[*GROUP, "other"]], {"budget": 0.5}, "'other' has 4 rows to share, and 'blocks.0.fc1' 8"),
        ([GROUP[:1]], {"budget": 0.5, "statistics": BROKEN}, "The moment of 'blocks.0.fc1' is not finite"),
        ([GROUP[:1]], {"budget": 0.5, "statistics": {}}, "no inputs of 'blocks.0.fc1'"),
    ],
)
def test_is_refused_before_anything_is_changed(groups, fields: dict[str, object], message: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=message):
        share_bases(model, groups, **fields)
    assert repr(model) == repr(model_of())
