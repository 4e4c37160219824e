"""What all functions that replace layers share: tied ones stay, two names are one layer, and it is all or nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from tests.compression.models import TwoLayers
from wara_peft.compression import (
    SVD,
    Activation,
    Factorization,
    StraightThroughFactorizer,
    calibrate,
    compress,
    factorize,
    low_rank_plus_sparse,
    ordered_low_rank,
    share_bases,
    straight_through,
    to_dense,
    truncate,
)

WAYS: dict[str, Callable[[nn.Module], Factorization]] = {
    "factorize": lambda model: factorize(model, 3),
    "ordered_low_rank": lambda model: ordered_low_rank(model, 3),
    "low_rank_plus_sparse": lambda model: low_rank_plus_sparse(model, 3, 0.1),
    "straight_through": lambda model: straight_through(model, 6, 4, 3),
}


class Tied(nn.Module):
    """Two layers, one of them under two names, and a head whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 12, bias=False)
        self.again = nn.Sequential(self.up)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.again(self.embedding(tokens))))


def parameters(model: nn.Module) -> int:
    return sum({id(parameter): parameter.numel() for parameter in model.parameters()}.values())


@pytest.mark.parametrize("way", WAYS)
def test_tied_layers_are_left_and_those_with_two_names_replaced_under_both(way: str) -> None:
    model = Tied().eval()
    model.down.train()
    before, bias = parameters(model), model.up.bias.detach().clone()
    done = WAYS[way](model)
    assert done.replaced == {"up": 3, "down": 3, "again.0": 3}
    assert done.left == {"head": "its weight is tied to that of another module, which would keep it"}
    assert model.again[0] is model.up and not isinstance(model.up, nn.Linear)
    assert type(model.head) is nn.Linear and model.head.weight is model.embedding.weight
    assert (model.up.training, model.down.training) == (False, True)
    assert torch.equal(model.up.bias, bias) and model.down.bias is None
    assert done.parameters_before == before
    if way == "straight_through":
        training = StraightThroughFactorizer()
        training.start(model)
        training.finish()
    assert done.parameters_after == parameters(model) < before


@pytest.mark.parametrize("way", WAYS)
def test_an_error_has_the_layers_name_and_leaves_all_as_it_was(way: str) -> None:
    model = Tied()
    with torch.no_grad():
        model.down.weight[0, 0] = torch.nan
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="'down' cannot be factorised: its weight holds NaN"):
        WAYS[way](model)
    assert dict(model.named_modules()) == before


def compress_in_order(model: nn.Module) -> None:
    x = torch.randn(2, 40, 12)
    found = calibrate(model, x, show_progress_bar=False)
    compress(model, Activation({"first": 3, "second": 3}), found, sequential=x, show_progress_bar=False)


def truncate_twice(model: nn.Module) -> None:
    factorize(model, 4)
    truncate(model, 2)


def factorize_and_back(model: nn.Module) -> None:
    factorize(model, 4)
    to_dense(model)


KEEPERS: dict[str, Callable[[nn.Module], object]] = {
    **WAYS,
    "compress": lambda model: compress(model, SVD({"first": 3, "second": 3}), show_progress_bar=False),
    "compress, sequential": compress_in_order,
    "truncate": truncate_twice,
    "to_dense": factorize_and_back,
    "share_bases": lambda model: share_bases(model, [["first"], ["second"]], 0.5),
}


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[object, object]:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("way", KEEPERS)
def test_users_hooks_stay_and_their_handles_remove_them(way: str) -> None:
    model, seen = TwoLayers(hidden=24), []
    old, counting = model.first, Counting()
    add_hook_to_module(old, counting)
    handles = [
        old.register_forward_pre_hook(lambda *_: seen.append("before")),
        old.register_forward_pre_hook(lambda *_: seen.append("before with names"), with_kwargs=True),
        old.register_forward_hook(lambda *_: seen.append("after")),
        old.register_forward_hook(lambda *_: seen.append("after with names"), with_kwargs=True),
        old.register_forward_hook(lambda *_: seen.append("always"), always_call=True),
        old.register_full_backward_pre_hook(lambda *_: seen.append("before backward")),
        old.register_full_backward_hook(lambda *_: seen.append("after backward")),
    ]
    KEEPERS[way](model)
    assert model.first is not old
    seen.clear()
    counting.calls = 0
    x = torch.randn(3, 12, requires_grad=True)
    model(x).sum().backward()
    assert len(seen) == len(set(seen)) == len(handles) and counting.calls == 1
    seen.clear()
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert seen == []


@pytest.mark.parametrize("way", KEEPERS)
def test_new_layers_take_their_input_by_the_name_that_pytorch_has_for_it(way: str) -> None:
    model, x = TwoLayers(hidden=24), torch.randn(3, 12)
    KEEPERS[way](model)
    assert torch.equal(model.first(input=x), model.first(x))
