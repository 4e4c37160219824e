"""Dense bases and sparse coefficients: identities of the layer, and gradients that go straight through."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from tests.compression.models import TwoLayers, batches, llama
from wara_peft import WaRAConfig
from wara_peft.compression import (
    DenseSparseLinear,
    StraightThroughFactorizer,
    StraightThroughLinear,
    dense_sparse,
    load_compressed,
    save_compressed,
    straight_through,
    to_dense,
)
from wara_peft.compression.solvers.dictionary import ksvd
from wara_peft.compression.solvers.low_rank import Metric
from wara_peft.compression.training.dense_sparse import set_dictionary
from wara_peft.factorized.sparse_rows import unpack_bits


def weight_of(m: int = 12, n: int = 20) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64)


def dense_by_hand(layer: DenseSparseLinear) -> np.ndarray:
    blocks = len(layer.bases)
    places = unpack_bits(layer.support, layer.atoms).view(blocks, layer.in_features, layer.atoms)
    values = layer.values.detach().view(blocks, layer.in_features, layer.nonzeros)
    rows = []
    for block in range(blocks):
        columns = []
        for column in range(layer.in_features):
            atoms = places[block, column].nonzero().flatten().numpy()
            assert len(atoms) == layer.nonzeros
            columns.append(layer.bases[block].detach().numpy()[:, atoms] @ values[block, column].numpy())
        rows.append(np.stack(columns, 1))
    return np.concatenate(rows)


def test_is_the_product_of_its_parts() -> None:
    layer = dense_sparse(weight_of(), 6, 5, 2)
    layer.bias = nn.Parameter(torch.randn(12, dtype=torch.float64))
    expected = torch.from_numpy(dense_by_hand(layer))
    torch.testing.assert_close(layer.weight.detach(), expected)
    x = torch.randn(2, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ expected.T + layer.bias)
    sizes = {name: tensor.nbytes for name, tensor in layer.state_dict().items()}
    assert sizes == {"bases": 8 * 12 * 5, "values": 8 * 2 * 20 * 2, "support": 2 * 20, "bias": 8 * 12}


def test_takes_the_factors_of_the_dictionary_solver() -> None:
    weight = weight_of()
    layer = DenseSparseLinear(20, 12, 6, 5, 2, bias=False, dtype=torch.float64)
    for index in (0, 1):
        found = ksvd(weight[6 * index : 6 * index + 6].T, 5, 2, Metric())
        set_dictionary(layer, index, found)
        torch.testing.assert_close(layer.weight.detach()[6 * index : 6 * index + 6], found.weight.T)


def test_all_atoms_in_each_column_is_low_rank_by_blocks() -> None:
    weight = weight_of()
    layer = dense_sparse(weight, 6, 3, 3, iterations=40)
    tail = sum(torch.linalg.svdvals(rows)[3:].square().sum() for rows in weight.split(6))
    torch.testing.assert_close((layer.weight.detach() - weight).square().sum(), tail, rtol=1e-3, atol=0)


def made(bias: bool = True) -> tuple[StraightThroughLinear, Tensor]:
    weight = weight_of()
    return StraightThroughLinear(weight, weight[:, 0] if bias else None, dense_sparse(weight, 6, 5, 2)), weight


def test_gradient_goes_straight_through() -> None:
    layer, weight = made()
    x, upstream = torch.randn(4, 20, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    approximation = layer.factors.weight.detach().requires_grad_()
    assert not torch.allclose(approximation, weight, atol=0.1)
    expected = functional.linear(x, approximation, layer.bias)
    assert torch.equal(layer(x), expected)
    (of_approximation,) = torch.autograd.grad((expected * upstream).sum(), approximation)
    (layer(x) * upstream).sum().backward()
    assert torch.equal(layer.weight.grad, of_approximation)
    assert all(parameter.grad is None for parameter in layer.factors.parameters())


def test_fits_follow_the_weight_and_do_not_get_worse() -> None:
    layer, _ = made()
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight) * 0.3)
    x = torch.randn(4, 20, dtype=torch.float64)

    def error() -> float:
        return float((layer.factors.weight - layer.weight).detach().square().sum())

    errors = [error()]
    for _ in range(4):
        with torch.no_grad():
            layer.weight.mul_(1 + 1e-9)
        layer(x)
        errors.append(error())
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    counts = unpack_bits(layer.factors.support, 5).sum(1)
    assert bool((counts == 2).all())


def with_all_places(weight: Tensor) -> StraightThroughLinear:
    """A layer that can have any weight: as many atoms as rows in a block, and values in all places."""
    factors = DenseSparseLinear(20, 12, 3, 3, 3, bias=False, dtype=torch.float64)
    for index, rows in enumerate(weight.split(3)):
        set_dictionary(factors, index, ksvd(rows.T, 3, 3, Metric()))
    return StraightThroughLinear(weight, weight[:, 0], factors)


class WritesToData:
    """SGD as some optimizers write it: PyTorch does not count such changes as versions of the tensor."""

    def __init__(self, parameters, lr: float) -> None:
        self.parameters, self.lr = [p for p in parameters if p.requires_grad], lr

    def step(self) -> None:
        for parameter in self.parameters:
            parameter.data.sub_(parameter.grad, alpha=self.lr)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
        lambda parameters: WritesToData(parameters, lr=0.1),
    ],
)
def test_each_forward_factorises_the_weight_that_there_is(optimizer, seed: int) -> None:
    """Where a factorisation can be any weight, training is that of a dense layer, to the last step."""
    torch.manual_seed(seed)
    weight = weight_of()
    model = nn.Sequential(with_all_places(weight))
    dense = nn.Linear(20, 12, dtype=torch.float64)
    dense.load_state_dict({"weight": weight, "bias": weight[:, 0]})
    training = StraightThroughFactorizer()
    training.start(model)
    ours, theirs = optimizer(list(model.parameters())), optimizer(list(dense.parameters()))
    for _ in range(7):
        x, y = torch.randn(5, 20, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-9)
        for one, by in ((model, ours), (dense, theirs)):
            by.zero_grad()
            (one(x) - y).square().mean().backward()
            by.step()
    assert not torch.allclose(dense.weight, weight, atol=1e-2)
    torch.testing.assert_close(model.eval()(x), dense(x), rtol=0, atol=1e-9)
    training.finish()
    assert isinstance(model[0], DenseSparseLinear)
    torch.testing.assert_close(model[0].weight, dense.weight, rtol=0, atol=1e-9)


def test_finish_keeps_the_last_step() -> None:
    torch.manual_seed(0)
    weight, last = weight_of(), weight_of()
    model = nn.Sequential(with_all_places(weight))
    training = StraightThroughFactorizer()
    training.start(model)
    with torch.no_grad():
        model[0].weight.copy_(last)
    training.finish()
    torch.testing.assert_close(model[0].weight.detach(), last, rtol=0, atol=1e-9)


def test_factors_stay_while_the_weight_does() -> None:
    layer, _ = made()
    x = torch.randn(4, 20, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.add_(1.0)
    layer(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()(x)
    checkpoint(layer.train(), x.requires_grad_(), use_reentrant=False).sum().backward()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    # A layer that loads this state goes on from there, too.
    other, _ = made()
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(made()[0])
    StraightThroughFactorizer().start(model)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'0' cannot be factorised: training has brought NaN or infinity"):
        model(torch.randn(4, 20, dtype=torch.float64))


def arguments(path: Path, steps: int = 6, save_steps: int = 100) -> TrainingArguments:
    return TrainingArguments(
        path, max_steps=steps, save_steps=save_steps, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        seed=3, disable_tqdm=True, logging_steps=100, learning_rate=1e-2, lr_scheduler_type="constant", bf16=True,
    )  # fmt: skip


def rows() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    ids = torch.randint(3, 40, (16, 8))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_trains_ends_in_factors_and_saves(tmp_path: Path) -> None:
    model = llama()
    result = straight_through(model, 16, 8, 2, target_modules=["up_proj", "down_proj"])
    before = model.model.layers[0].mlp.up_proj.factors.support.clone()
    Trainer(model, arguments(tmp_path / "run"), train_dataset=rows(), callbacks=[StraightThroughFactorizer()]).train()
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, DenseSparseLinear) and not torch.equal(layer.support, before)
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == result.parameters_after
    assert result.parameters_after < result.parameters_before
    save_compressed(model, tmp_path / "a")
    loaded = load_compressed(tmp_path / "a")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        batch = batches(1, labelled=False)[0]
        expected = loaded(**batch).logits
        assert len(to_dense(loaded)) == 4
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_model_in_training_is_not_saved_as_compressed(tmp_path: Path) -> None:
    model = llama()
    straight_through(model, 16, 8, 2, target_modules=["up_proj"])
    with pytest.raises(ValueError, match=r"up_proj' is a StraightThroughLinear, which is still being trained"):
        save_compressed(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=r"up_proj'.* is still being trained"):
        to_dense(model)
    model.save_pretrained(tmp_path / "b")  # as `Trainer` does
    with pytest.raises(ValueError, match=r"up_proj' is a StraightThroughLinear, which is still being trained"):
        load_compressed(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 4])  # within an epoch, and at its end
def test_trainer_resumes_to_the_bit_and_saves(tmp_path: Path, stop: int) -> None:
    def train(path: Path, steps: int, seed: int = 0, **fields: object) -> nn.Module:
        torch.manual_seed(seed)
        model = llama()
        straight_through(model, 16, 8, 2, target_modules=["up_proj", "down_proj"])
        callbacks = [StraightThroughFactorizer()]
        Trainer(model, arguments(path, steps, stop), train_dataset=rows(), callbacks=callbacks).train(**fields)
        return model

    whole = train(tmp_path / "a", 7)
    train(tmp_path / "b", stop)
    checkpoint = str(tmp_path / "b" / f"checkpoint-{stop}")
    # Of other first values, so that all there is comes from the checkpoint.
    resumed = train(tmp_path / "b", 7, seed=9, resume_from_checkpoint=checkpoint)
    state = whole.state_dict()
    assert state.keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    supports = [name for name in state if name.endswith("support")]
    assert len(supports) == 4
    save_compressed(resumed, tmp_path / "c")
    loaded = load_compressed(tmp_path / "c")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("config", [LoraConfig, WaRAConfig])
def test_adapters_are_refused_by_name(config: type) -> None:
    model = TwoLayers(20, 12)
    straight_through(model, 6, 5, 2, ["first"])
    with pytest.raises((ValueError, TypeError), match="StraightThroughLinear"):
        get_peft_model(model, config(target_modules=["first"]))
    training = StraightThroughFactorizer()
    training.start(model)
    training.finish()
    with pytest.raises((ValueError, TypeError), match="DenseSparseLinear"):
        get_peft_model(model, config(target_modules=["first"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseSparseLinear(20, 12, 5, 4, 2), "block=5 must divide the 12 outputs"),
        (lambda: DenseSparseLinear(20, 12, 6, 4, 5), "nonzeros=5 must be an int from 1 to 4"),
        (lambda: straight_through(TwoLayers(20, 12), 6, 12, 6), "'first' cannot be factorised: block=6, atoms=12"),
        (lambda: StraightThroughFactorizer(0), "iterations=0"),
        (lambda: StraightThroughFactorizer().start(TwoLayers()), "no StraightThroughLinear"),
    ],
)
def test_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
