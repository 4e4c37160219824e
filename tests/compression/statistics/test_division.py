"""Statistics of gradients and inputs do not depend on how samples are divided into batches.

The references are autograd's gradients of weights, one sample at a time, and two-pass moments in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding

from tests.compression.models import TwoLayers, bert, for_causal, llama
from wara_peft.compression import calibrate

KINDS = ["inputs", "gradients", "fisher"]
DIVISIONS = [[7], [6, 1], [1, 6], [3, 2, 2], [1] * 7]
QUIET = {"show_progress_bar": False}


class Windowed(nn.Module):
    """Moves windows of positions into the batch, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (4, 2)).flatten(0, 1)
        return self.out(torch.tanh(self.inside(windows))).unflatten(0, (-1, 4)).mean((1, 2))


class Shared(nn.Module):
    """Has one layer under two names, and a batch axis that is not the first one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(5, 5), nn.Linear(5, 3)
        self.again = self.inside

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inside(x.transpose(0, 1))) * 2
        return self.out(torch.tanh(self.again(x))).mean(0)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.TransformerEncoderLayer(5, 1, 7, dropout=0.0, batch_first=False)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inside(x.transpose(0, 1))).mean(0)


class Repeated(nn.Module):
    """Runs a layer three times: by its argument's name, in a checkpoint, and plainly."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.inside, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inside(input=x))
        x = checkpoint(lambda y: torch.tanh(self.inside(y)), x, use_reentrant=self.use_reentrant)
        return self.out(torch.tanh(self.inside(x))).mean(1)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def by_hand(model: nn.Module, name: str, samples: list[Any], loss_fn: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Give the mean of squared gradients, E[g gᵀ] and E[x xᵀ] of a layer, from one run for each sample."""
    layer = model.get_submodule(name)
    squares, outer, inputs = [], [], []

    def keep(_: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(output)
        inputs.append(args[0].detach().flatten(0, -2))

    for sample in samples:
        outputs: list[Tensor] = []
        handle = layer.register_forward_hook(keep)
        loss = loss_fn(model, sample)
        weight, *found = torch.autograd.grad(loss, [layer.weight, *outputs])
        handle.remove()
        squares.append(weight.square().sum(0))
        outer += [g.flatten(0, -2) for g in found]
    g, x = torch.cat(outer), torch.cat(inputs)
    return torch.stack(squares).mean(0), g.T @ g / len(g), x.T @ x / len(x)


def divided(samples: tuple[Tensor, Tensor], sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(*(torch.split(values, sizes) for values in samples), strict=True)


@pytest.mark.parametrize("sizes", DIVISIONS)
@pytest.mark.parametrize("kind", [Windowed, Shared, SequenceFirst])
def test_any_division_gives_what_single_samples_give(kind: type[nn.Module], sizes: list[int]) -> None:
    model = kind().double().eval()
    # With as many samples as positions, no shape tells which axis is which.
    samples = torch.randn(7, 8, 5, dtype=torch.float64), torch.randint(3, (7,))
    found = calibrate(model, divided(samples, sizes), KINDS, loss_fn=cross_entropy, **QUIET)
    for name in found:
        fisher, gradients, moment = by_hand(model, name, list(divided(samples, [1] * 7)), cross_entropy)
        torch.testing.assert_close(found[name].fisher, fisher, rtol=1e-10, atol=1e-18)
        torch.testing.assert_close(found[name].gradients, gradients, rtol=1e-10, atol=1e-18)
        torch.testing.assert_close(found[name].moment, moment, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("sizes", [[7], [6, 1], [1] * 7])
def test_a_layer_that_runs_several_times_and_in_a_checkpoint(sizes: list[int], use_reentrant: bool) -> None:
    model = Repeated(use_reentrant).double()
    samples = torch.randn(7, 8, 5, dtype=torch.float64), torch.randint(3, (7,))
    found = calibrate(model, divided(samples, sizes), KINDS, loss_fn=cross_entropy, **QUIET)
    squares = []
    model.use_reentrant = False  # `torch.autograd.grad` cannot go through the other kind
    for sample in divided(samples, [1] * 7):
        (gradient,) = torch.autograd.grad(cross_entropy(model, sample), model.inside.weight)
        squares.append(gradient.square().sum(0))
    torch.testing.assert_close(found["inside"].fisher, torch.stack(squares).mean(0), rtol=1e-10, atol=1e-18)
    assert found["inside"].count == 7 * 8 * 3 and found["out"].count == 7 * 8


@pytest.mark.filterwarnings("ignore:Too few samples")
@pytest.mark.parametrize("sizes", [[6], [5, 1], [1] * 6])
@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_token_means_of_unequal_lengths(kind: type, sizes: list[int]) -> None:
    model = llama().double()
    lengths = torch.tensor([8, 2, 5, 3, 8, 1])
    mask = (torch.arange(8) < lengths[:, None]).long()
    tokens = torch.randint(3, 40, (6, 8))
    whole = for_causal([{"input_ids": tokens, "attention_mask": mask}])[0]
    parts = {key: torch.split(value, sizes) for key, value in whole.items()}
    data = [kind({key: value[i] for key, value in parts.items()}) for i in range(len(sizes))]
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    found = calibrate(model, data, KINDS, target_modules=names, **QUIET)
    for name in names:
        squares, moments = [], []
        for tokens_of_one, length in zip(tokens, lengths, strict=True):
            ids = tokens_of_one[None, :length]  # without padding
            if length > 1:
                loss = model(input_ids=ids, labels=ids).loss
                (gradient,) = torch.autograd.grad(loss, model.get_submodule(name).weight)
                squares.append(gradient.square().sum(0))
            handle = model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, moments=moments: moments.append(args[0].detach().flatten(0, 1))
            )
            model(input_ids=ids)
            handle.remove()
        x = torch.cat(moments)
        # The loss of one token without a next one is 0 / 0 in transformers, so its gradient is left out above.
        torch.testing.assert_close(found[name].fisher, torch.stack(squares).sum(0) / 6, rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(found[name].moment, x.T @ x / len(x), rtol=1e-8, atol=1e-12)
        assert found[name].count == int(lengths.sum())


class Translated(nn.Module):
    """Takes masked batches, and works on (positions, samples) or on all positions in one row inside."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.inside = form, nn.Linear(5, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inside(x.transpose(0, 1) if self.form == "sequence first" else x.flatten(0, 1))


@pytest.mark.parametrize("way", ["mapping", "tuple", "loss_fn"])
@pytest.mark.parametrize("form", ["sequence first", "one row"])
@pytest.mark.parametrize("positions", [6, 4])
def test_padding_does_not_count_in_other_forms(way: str, form: str, positions: int) -> None:
    model = Translated(form).double()
    x = torch.randn(6, positions, 5, dtype=torch.float64)
    mask = torch.arange(positions) < torch.tensor([1, 2, 3, 4, 2, 1])[:, None]
    call: Any = None
    if way == "loss_fn":
        call = lambda model, batch: model(*batch).sum()  # noqa: E731
    batch = {"x": x, "attention_mask": mask} if way == "mapping" else (x, mask)
    found = calibrate(model, [batch], loss_fn=call, **QUIET)["inside"]
    rows = x[mask]
    assert found.count == len(rows) == 13
    torch.testing.assert_close(found.moment, rows.T @ rows / 13, rtol=1e-10, atol=1e-12)


def test_texts_and_what_samples_share() -> None:
    model = TwoLayers(2, 3).double()
    data = [(["ab", "c"], torch.ones(1, 2)), (["abc"], torch.ones(1, 2))]
    seen: list[Any] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0])
        x = torch.tensor([[len(text), 1.0] for text in batch[0]], dtype=torch.float64)
        return model(x).square().sum(1).mean()

    data = [(texts, shared, 3) for texts, shared in data]
    calibrate(model, data, ["fisher"], loss_fn=loss_fn, **QUIET)
    assert seen == [["ab"], ["c"], ["abc"]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(4, 12), torch.ones(3)), "tensors of 4 and of 3 entries"),
        ({"x": 3}, "no tensors"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*Give batches whose tensors have one entry for each sample"):
        calibrate(TwoLayers(), [batch], ["fisher"], loss_fn=lambda model, batch: model(batch[0]).sum(), **QUIET)


def test_one_sample_of_many_patches_is_not_taken_apart() -> None:
    model = bert()
    calls = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        calls.append(batch["patches"].shape)
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    batch = {"input_ids": torch.ones(1, 5).long(), "patches": torch.ones(9, 2), "labels": torch.ones(1).long()}
    calibrate(model, [batch], ["fisher"], loss_fn=loss_fn, **QUIET)
    assert calls == [(9, 2)]
    with pytest.raises(ValueError, match="of 2 and of 9 entries"):
        batch |= {"input_ids": torch.ones(2, 5).long()}
        calibrate(model, [batch], ["fisher"], loss_fn=loss_fn, **QUIET)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer(5, 1, 7), nn.Sequential(nn.Linear(5, 5), nn.GRU(5, 3))])
def test_batches_with_positions_first_are_refused(kind: nn.Module) -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        output = model(batch)
        return (output[0] if isinstance(output, tuple) else output).square().mean()

    with pytest.raises(ValueError, match=r"batch_first=False .*samples along dimension 0"):
        calibrate(kind, [torch.randn(8, 4, 5)], ["fisher"], loss_fn=loss_fn, **QUIET)
    found = calibrate(
        kind, [torch.randn(4, 8, 5)], ["fisher"], loss_fn=lambda m, batch: loss_fn(m, batch.transpose(0, 1)), **QUIET
    )
    assert all(bool(entry.fisher.any()) for entry in found.values())
