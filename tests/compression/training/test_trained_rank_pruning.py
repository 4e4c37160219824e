"""Truncations that do not ratchet, the sub-gradient beside autograd, and the way to factorised layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.compression.models import llama
from wara_peft.compression import (
    SVD,
    Activation,
    LowRankConv,
    LowRankLinear,
    TrainedRankPruning,
    calibrate,
    compress,
    load_compressed,
    save_compressed,
)


class Net(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.conv = nn.Conv2d(4, 12, 3)
        self.point = nn.Conv2d(12, 4, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.point(torch.relu(self.conv(torch.relu(self.stem(x))))).flatten(1))
        return result


def net() -> Net:
    return Net().double()


def rank_of(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.detach(), rtol=1e-8))


def test_truncation_is_the_least_rank_of_the_energy() -> None:
    model = net()
    before = copy.deepcopy(model)
    pruning = TrainedRankPruning(energy=0.8)
    pruning.start(model)
    pruning.before_forward(0)
    assert torch.equal(model.stem.weight, before.stem.weight) and torch.equal(model.point.weight, before.point.weight)
    for new, old in (
        (model.head.weight, before.head.weight),
        (model.conv.weight.flatten(1), before.conv.weight.flatten(1)),
    ):
        left, values, right = torch.linalg.svd(old.detach(), full_matrices=False)
        shares = values.square().cumsum(0) / values.square().sum()
        rank = int((shares < 0.8).sum()) + 1
        assert 1 < rank < len(values) and rank_of(new) == rank
        torch.testing.assert_close(new.detach(), left[:, :rank] * values[:rank] @ right[:rank])
        lost = (new - old).square().sum() / old.square().sum()
        assert float(lost) == pytest.approx(1 - float(shares[rank - 1]), rel=1e-9) and float(lost) <= 0.2


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_without_gradient_or_with_decay_alone_the_rank_stays(decay: float) -> None:
    model = net()
    pruning = TrainedRankPruning(energy=0.8, period=1)
    pruning.start(model)
    pruning.before_forward(0)
    rank, weight = rank_of(model.head.weight), model.head.weight.detach().clone()
    # By the energy of what is left each time, the rank would fall.
    values = torch.linalg.svdvals(weight).square()
    assert int((values.cumsum(0) < 0.8 * values.sum()).sum()) + 1 < rank
    for step in range(1, 9):
        with torch.no_grad():
            model.head.weight.mul_(decay)
        pruning.before_forward(step)
        assert rank_of(model.head.weight) == rank
        torch.testing.assert_close(model.head.weight.detach(), weight * decay**step)


def test_rank_falls_as_the_energy_gathers_and_noise_is_taken_away() -> None:
    """By E_t = max(‖W_t‖², E_{t−1} min(1, ‖W_t‖² / ‖W'_{t−1}‖²)) and the least k with Σ_{i≤k} σ_i² ≥ e E_t."""
    model = net()
    weight = model.head.weight
    pruning = TrainedRankPruning(energy=0.8, period=1)
    pruning.start(model)
    reference = left_over = float(weight.detach().square().sum())
    ranks = []
    for step in range(10):
        with torch.no_grad():
            if 0 < step < 9:  # noise of a hundredth of the energy, again and again
                noise = torch.randn_like(weight)
                weight.add_(noise * 0.1 * weight.norm() / noise.norm())
            if step == 9:
                left, values, right = torch.linalg.svd(weight, full_matrices=False)
                values[1:] *= 0.01
                weight.copy_(left * values @ right)
            energies = torch.linalg.svdvals(weight).square().cumsum(0)
        total = float(energies[-1])
        reference = max(total, reference * min(1.0, total / left_over))
        ranks.append(int((energies < 0.8 * reference).sum()) + 1)
        left_over = float(energies[ranks[-1] - 1])
        pruning.before_forward(step)
        assert rank_of(weight) == ranks[-1]
    assert max(ranks) < 10 and ranks[-1] < min(ranks[:-1])


def test_sub_gradient_is_the_nuclear_norms_and_on_its_steps_alone() -> None:
    model, x = net(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    pruning = TrainedRankPruning(energy=1.0, penalty=0.3, period=2)
    pruning.start(model)
    for step, counts in ((0, 1), (1, 0), (2, 1)):
        model.zero_grad()
        pruning.before_forward(step)
        model(x).square().sum().backward()
        alone = {name: value.grad.clone() for name, value in model.named_parameters()}
        pruning.after_backward()
        norms = torch.linalg.matrix_norm(model.head.weight, "nuc") + torch.linalg.matrix_norm(
            model.conv.weight.flatten(1), "nuc"
        )
        wanted = torch.autograd.grad(norms, [model.head.weight, model.conv.weight])
        for name, gradient in zip(("head.weight", "conv.weight"), wanted, strict=True):
            torch.testing.assert_close(
                model.get_parameter(name).grad, alone[name] + counts * 0.3 * gradient, rtol=1e-9, atol=1e-9
            )
        assert torch.equal(model.stem.weight.grad, alone["stem.weight"])


def test_finish_factorises_at_the_ranks_reached() -> None:
    model, x = net(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    pruning = TrainedRankPruning(energy=0.5)
    pruning.start(model)
    pruning.before_forward(0)
    expected, ranks = model(x), (rank_of(model.head.weight), rank_of(model.conv.weight.flatten(1)))
    report = pruning.finish()
    assert isinstance(model.head, LowRankLinear)
    assert isinstance(model.conv, LowRankConv)
    assert (model.head.rank, model.conv.rank) == ranks == tuple(layer.rank for layer in report.layers)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    parameters = [sum(p.numel() for p in layer.parameters()) for layer in (model.head, model.conv)]
    assert [layer.parameters_after for layer in report.layers] == parameters and report.spent == sum(parameters)
    assert report.before == 16 * 10 + 10 + 4 * 12 * 9 + 12
    assert model.compression_report is report and report.allocation == "given"


def rows() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    ids = torch.randint(3, 40, (16, 8))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(path: Path, steps: int) -> TrainingArguments:
    return TrainingArguments(
        path, max_steps=steps, save_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, seed=3,
        disable_tqdm=True, logging_steps=100, learning_rate=3e-3, lr_scheduler_type="constant", bf16=True,
    )  # fmt: skip


@pytest.mark.slow
def test_trainer_resumes_to_the_bit_and_saves(tmp_path: Path) -> None:
    def train(path: Path, steps: int, **fields: object) -> nn.Module:
        torch.manual_seed(0)
        model = llama()
        pruning = TrainedRankPruning(energy=0.7, penalty=1e-3, period=2)
        Trainer(model, arguments(path, steps), train_dataset=rows(), callbacks=[pruning]).train(**fields)
        assert pruning.report is model.compression_report and len(pruning.report.layers) == 14
        return model

    whole = train(tmp_path / "a", 6)
    train(tmp_path / "b", 3)
    resumed = train(tmp_path / "b", 6, resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    state = whole.state_dict()
    assert state.keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    assert any(isinstance(module, LowRankLinear) for module in resumed.modules())
    save_compressed(resumed, tmp_path / "c")
    loaded = load_compressed(tmp_path / "c")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert repr(loaded) == repr(resumed)
    assert loaded.compression_report == resumed.compression_report


def test_compress_at_given_ranks() -> None:
    model = llama()
    names = [f"model.layers.{index}.mlp.up_proj" for index in (0, 1)]
    report = compress(model, SVD({names[0]: 3, names[1]: 16}), show_progress_bar=False)
    assert model.get_submodule(names[0]).rank == 3 and type(model.get_submodule(names[1])) is nn.Linear
    assert [(layer.name, layer.rank) for layer in report.layers] == [(names[0], 3), (names[1], None)]
    assert report.spent == report.budget == 3 * 48 + 16 * 32
    with pytest.raises(ValueError, match=r"rank=17 of '.*layers\.1\.mlp\.up_proj' must be an int from 1 to 16"):
        compress(model, SVD({names[1]: 17}), show_progress_bar=False)
    with pytest.raises(ValueError, match="ranks of 'up_proj'"):
        compress(model, SVD({names[1]: 2, "up_proj": 3}), show_progress_bar=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"energy": 0}, "energy=0 must be more than 0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"penalty": -1}, "penalty=-1"),
        ({"period": 0}, "period=0"),
    ],
)
def test_out_of_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainedRankPruning(**fields)


def test_a_weight_that_diverged_is_named_before_any_is_truncated() -> None:
    model = net()
    pruning = TrainedRankPruning()
    pruning.start(model)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    before = model.conv.weight.detach().clone()
    for truncation in (lambda: pruning.before_forward(0), pruning.finish):
        with pytest.raises(ValueError, match=r"'head' cannot be truncated: .* lower learning rate"):
            truncation()
    assert torch.equal(model.conv.weight, before) and type(model.conv) is nn.Conv2d


def test_targets_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'nothing' matches no"):
        TrainedRankPruning(target_modules=["nothing"]).start(net())
    broken = net()
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'head' cannot be factorised: its weight holds NaN"):
        TrainedRankPruning().start(broken)
    with pytest.raises(RuntimeError, match="has not been started"):
        TrainedRankPruning().before_forward(0)


def test_finish_takes_the_class_of_a_method() -> None:
    model, x = nn.Sequential(nn.Linear(20, 30)).double(), torch.randn(50, 20).double()
    pruning = TrainedRankPruning(energy=0.2, target_modules=["0"])
    pruning.start(model)
    before = model[0].weight.detach().clone()
    for wrong in ("svd", SVD(0.5), int):
        with pytest.raises(TypeError, match=r"^finish\(method, statistics\): method must be the class of a method"):
            pruning.finish(wrong)
    assert torch.equal(model[0].weight, before)
    pruning.before_forward(0)
    report = pruning.finish(Activation, calibrate(model, [x], show_progress_bar=False))
    assert report.solver == "activation" and report.allocation == "given" and report.layers[0].rank == model[0].rank
