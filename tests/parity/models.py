"""Small models for the table, and what is asked of an adapter everywhere: that it starts from nothing and trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tests import models
from tests.models import mlp
from tests.references import Mlp

from . import same_factors
from .table import Method

X = models.X.double()
ATTENTION = ["q_proj", "v_proj"]


def run(model: nn.Module, inputs: Any = X, **options: Any) -> Tensor:
    """The output, logits or last hidden state, for a tensor or a dict of them."""
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs = inputs.to(torch.get_default_dtype())
    return models.run(model, inputs, **options)


@torch.no_grad()
def output(model: nn.Module, inputs: Any = X, **options: Any) -> Tensor:
    result = run(model.eval(), inputs, **options)
    same_factors.meet(result)
    return result.double()


def adapted(method: Method, base: nn.Module | None = None, init: Any = False, **fields: Any) -> PeftModel:
    """A model with an adapter that changes something, unless init says otherwise, the same at every call."""
    base = mlp() if base is None else base
    fields.setdefault("target_modules", ["up", "down"] if isinstance(base, Mlp) else ATTENTION)
    torch.manual_seed(1)
    model = get_peft_model(base, method.config(init, **fields)).eval()
    method.finish(model, "default")
    return model


def add(model: nn.Module, method: Method, name: str, **fields: Any) -> None:
    """Add an adapter that changes something."""
    model.add_adapter(name, method.config(False, **fields))
    method.finish(model, name)


def layers_of(model: nn.Module, method: Method) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, method.layer_class)}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(one, other, atol=tolerance, rtol=tolerance)


def train(model: nn.Module, inputs: Any = X, steps: int = 5) -> None:
    """Train towards random outputs: the loss falls."""
    trained = [value for value in model.parameters() if value.requires_grad]
    goal = torch.randn(output(model, inputs).shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for step in range(steps):
        loss = (run(model.train(), inputs).double() - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if not step:
            same_factors.meet(loss)
            same_factors.meet_gradients(model)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]
    same_factors.take_trained(model)


def check_adapts(method: Method, base: nn.Module, inputs: Any, targets: Any, tolerance: float = 1e-4) -> PeftModel:
    """A new adapter changes nothing, and by training the output but not the base; merged it computes the same."""
    before = output(base, inputs)
    model = adapted(method, copy.deepcopy(base), init=True, target_modules=targets)
    assert layers_of(model, method)
    assert close(output(model, inputs), before, tolerance)
    train(model, inputs)
    after = output(model, inputs)
    assert not close(after, before, 1e-3)
    with model.disable_adapter():
        assert close(output(model, inputs), before, tolerance)
    assert close(output(copy.deepcopy(model).merge_and_unload(), inputs), after, tolerance)
    return model
