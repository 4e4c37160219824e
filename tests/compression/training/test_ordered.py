"""Ordered dropout of low-rank layers: SVD and PCA are what it learns, and cutting is exact in a training's life."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.compression.models import llama
from wara_peft import WaRAConfig
from wara_peft.compression import (
    LowRankLinear,
    OrderedLowRankLinear,
    OrderedRankTraining,
    load_compressed,
    ordered_low_rank,
    save_compressed,
)
from wara_peft.compression.training.ordered import cut_rank


class Net(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.first = nn.Linear(16, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(self.conv(x).flatten(1))))
        return result


def images() -> Tensor:
    return torch.randn(5, 2, 4, 4, dtype=torch.float64)


def ordered() -> tuple[Net, OrderedRankTraining]:
    net = Net().double()
    ordered_low_rank(net)
    training = OrderedRankTraining(penalty=1e-3)
    training.start(net)
    return net, training


def test_full_rank_computes_what_the_model_did() -> None:
    net, x = Net().double(), images()
    expected = net(x)
    result = ordered_low_rank(net)
    assert result.replaced == {"first": 6, "second": 3} and isinstance(net.first, OrderedLowRankLinear)
    assert type(net.conv) is nn.Conv2d
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


def fit(layer: OrderedLowRankLinear, x: Tensor, y: Tensor) -> None:
    """Minimise the mean of the losses at all ranks, which a draw of the rank has in expectation."""
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=1500, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  history_size=30, line_search_fn="strong_wolfe")  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=x.dtype)
        for rank in range(1, layer.rank + 1):
            layer.limit = rank
            total = total + (layer(x) - y).square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    layer.limit = None


def product(layer: OrderedLowRankLinear, rank: int) -> Tensor:
    return (layer.up.weight[:, :rank] @ layer.down.weight[:rank]).detach()


def test_linear_data_gives_the_svd_at_every_rank() -> None:
    target = torch.randn(5, 6, dtype=torch.float64)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    layer = OrderedLowRankLinear(6, 5, 3, bias=False, dtype=torch.float64)
    x = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64)).Q  # of identity moment
    fit(layer, x, x @ target.T)
    for rank in (1, 2, 3):
        torch.testing.assert_close(
            product(layer, rank), left[:, :rank] * values[:rank] @ right[:rank], atol=1e-4, rtol=0
        )
        cut = copy.deepcopy(layer)
        cut.cut(rank)
        torch.testing.assert_close(cut(x), x @ product(layer, rank).T)


def test_a_linear_autoencoder_gives_pca() -> None:
    x = torch.randn(60, 5, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2])
    x = x @ torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    layer = OrderedLowRankLinear(5, 5, 3, bias=False, dtype=torch.float64)
    fit(layer, x, x)
    _, vectors = torch.linalg.eigh(x.T @ x)
    for rank in (1, 2, 3):
        first = vectors.flip(1)[:, :rank]
        torch.testing.assert_close(product(layer, rank), first @ first.T, atol=1e-4, rtol=0)


def test_draws_are_uniform_over_all_pairs_and_a_function_of_the_step() -> None:
    _, training = ordered()
    drawn = [training.before_forward(step) for step in range(1800)]
    counts = Counter(drawn)
    assert set(counts) == {(name, b) for name, r in (("first", 6), ("second", 3)) for b in range(1, r + 1)}
    # 200 of each of 9, with a standard deviation of 13.
    assert all(abs(count - 200) < 4 * 13 for count in counts.values())
    again = OrderedRankTraining(penalty=0.0)
    again.start(ordered()[0])
    assert [again.before_forward(step) for step in range(100, 120)] == drawn[100:120]


def test_only_the_drawn_layer_differs_and_evaluation_is_full() -> None:
    net, training = ordered()
    x = images()
    draws = (training.before_forward(step) for step in range(100))
    name, rank = next((name, rank) for name, rank in draws if rank < net.get_submodule(name).rank)
    layer = net.get_submodule(name)
    reference = copy.deepcopy(net)
    for other in reference.modules():
        if isinstance(other, OrderedLowRankLinear):
            other.limit = None
    reference.get_submodule(name).cut(rank)
    torch.testing.assert_close(net(x), reference(x), rtol=0, atol=1e-12)
    assert not torch.allclose(net(x), net.eval()(x))
    layer.limit = layer.rank
    torch.testing.assert_close(net.train()(x), net.eval()(x), rtol=0, atol=1e-13)


def test_penalty_at_the_svd_and_where_a_tail_is_zero() -> None:
    net = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    values = torch.linalg.svdvals(net[0].weight.detach())
    ordered_low_rank(net)
    training = OrderedRankTraining(penalty=0.5)
    training.start(net)
    expected = 0.5 * 2 * sum(values[b:].sum().sqrt() for b in range(5))
    torch.testing.assert_close(training.penalty(), expected, rtol=1e-8, atol=0)
    with torch.no_grad():
        net[0].down.weight[3:] = 0
        net[0].up.weight[:, 3:] = 0
    wanted = torch.autograd.grad(training.penalty(), net[0].down.weight)[0]
    net[0](torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    alone = net[0].down.weight.grad.clone()
    training.after_backward()
    torch.testing.assert_close(net[0].down.weight.grad, alone + wanted)
    assert bool(net[0].down.weight.grad.isfinite().all()) and not bool(wanted[3:].any())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_shrinking_cuts_parameters_and_moments_and_changes_no_further_step(kind: type) -> None:
    """A model with empty tails trains on as one that has been cut."""
    net, training = ordered()
    x = images()
    options = {"lr": 1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    optimizer = kind(net.parameters(), **options)
    with torch.no_grad():
        for layer, rank in ((net.first, 3), (net.second, 2)):
            layer.down.weight[rank:] = 0
            layer.up.weight[:, rank:] = 0

    def step(model: nn.Module, using: torch.optim.Optimizer) -> None:
        model(x).square().sum().backward()
        using.step()
        using.zero_grad()

    step(net, optimizer)  # both sides of a tail are zero, and have no gradient
    whole = copy.deepcopy(net)
    other = kind(whole.parameters(), **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [id(parameter) for parameter in net.parameters()]
    assert training.shrink(optimizer) == {"first": 3, "second": 2}
    assert [id(parameter) for parameter in net.parameters()] == before
    for parameter in net.parameters():
        moments = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.dim()]
        assert moments and all(value.shape == parameter.shape for value in moments)
    for _ in range(3):
        step(net, optimizer)
        step(whole, other)
    torch.testing.assert_close(net(x), whole(x), rtol=1e-12, atol=1e-12)
    assert net.second.down.out_features == net.second.rank == 2 and net.first.up.in_features == 3


def test_cut_rank_takes_the_first_components() -> None:
    net, _ = ordered()
    down = net.first.down.weight.detach().clone()
    optimizer = torch.optim.AdamW(net.parameters())
    net(images()).sum().backward()
    optimizer.step()
    down = net.first.down.weight.detach().clone()
    moment = optimizer.state[net.first.down.weight]["exp_avg"].clone()
    cut_rank(net.first, 2, optimizer)
    assert torch.equal(net.first.down.weight, down[:2])
    assert torch.equal(optimizer.state[net.first.down.weight]["exp_avg"], moment[:2])


def test_a_loss_that_is_still_alive_does_not_hold_the_old_shape() -> None:
    net, training = ordered()
    x = images()
    optimizer = torch.optim.AdamW(net.parameters())
    for rank in (3, 2, 1):
        loss = net(x).square().sum()
        loss.backward()
        optimizer.step()
        cut_rank(net.first, rank, optimizer)
        assert net.first.down.weight.shape == (rank, 16) and net.first.down.weight.dtype == torch.float64
    loss = net(x).square().sum()
    loss.backward()
    assert net.first.down.weight.grad.shape == (1, 16)
    assert training.layers["first"].rank == 1


def test_finish_makes_layers_dense_at_the_break_even() -> None:
    net, training = ordered()
    x = images()
    training.layers["first"].cut(2)
    expected = net.eval()(x)
    ranks = training.finish()
    assert ranks == {"first": 2, "second": None}
    assert type(net.second) is nn.Linear and type(net.first) is LowRankLinear
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [LoraConfig, WaRAConfig])
def test_adapters_go_on_afterwards(config: type) -> None:
    net, training = ordered()
    x = images()
    training.layers["first"].cut(4)
    training.finish()
    expected = net(x)
    adapted = get_peft_model(net, config(r=2, target_modules=["first.down", "first.up", "second"]))
    torch.testing.assert_close(adapted(x), expected)
    net, _ = ordered()
    adapted = get_peft_model(net, config(r=2, target_modules=["first.down"]))
    with pytest.raises(ValueError, match=r"'.*first\.down' has a PEFT adapter"):
        OrderedRankTraining(penalty=0.0).start(adapted)


def rows() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    ids = torch.randint(3, 40, (16, 8))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(path: Path, steps: int, **fields: object) -> TrainingArguments:
    return TrainingArguments(
        path, max_steps=steps, save_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, seed=3,
        disable_tqdm=True, logging_steps=100, learning_rate=3e-3, lr_scheduler_type="constant", bf16=True, **fields,
    )  # fmt: skip


def converted() -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    ordered_low_rank(model)
    return model


@pytest.mark.slow
def test_trainer_shrinks_resumes_to_the_bit_and_saves(tmp_path: Path) -> None:
    def callback() -> OrderedRankTraining:
        return OrderedRankTraining(penalty=1e-3, threshold=0.08)

    whole = converted()
    Trainer(whole, arguments(tmp_path / "a", 8), train_dataset=rows(), callbacks=[callback()]).train()
    part = converted()
    # The first epoch ends with step 4, so that what is saved at step 6 is cut.
    Trainer(part, arguments(tmp_path / "b", 6), train_dataset=rows(), callbacks=[callback()]).train()
    resumed = converted()
    Trainer(resumed, arguments(tmp_path / "b", 8), train_dataset=rows(), callbacks=[callback()]).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6")
    )
    ranks = [layer.rank for layer in resumed.modules() if isinstance(layer, LowRankLinear)]
    assert ranks and min(ranks) < 8
    state = whole.state_dict()
    assert state.keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    save_compressed(resumed, tmp_path / "c")
    loaded = load_compressed(tmp_path / "c")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert repr(loaded) == repr(resumed)


def test_is_refused() -> None:
    with pytest.raises(ValueError, match=r"penalty=-1 must be at least 0"):
        OrderedRankTraining(penalty=-1)
    with pytest.raises(ValueError, match="no ordered layer; call ordered_low_rank"):
        OrderedRankTraining(penalty=0.0).start(Net())
    with pytest.raises(ValueError, match="rank=0 must be an int of at least 1"):
        ordered_low_rank(Net(), 0)
    with pytest.raises(ValueError, match="'conv' matches no linear layer"):
        ordered_low_rank(Net(), target_modules=["conv", "first"])
    net, training = ordered()
    optimizer = torch.optim.Adafactor(net.parameters())
    net(images()).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"'row_var' of shape \(6, 1\) for 'first'"):
        training.shrink(optimizer)
    with pytest.raises(RuntimeError, match="has not been started"):
        OrderedRankTraining(penalty=0.0).penalty()
