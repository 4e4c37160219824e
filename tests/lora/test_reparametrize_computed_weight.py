"""Writes to the tensor that a reader of a reparametrised `weight` gets: by views, by any method, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.lora.test_reparametrize_writers import (
    X,
    assert_same,
    everything,
    first,
    output,
    plain,
    reparametrised,
    weights,
)


def test_views_share_one_weight():
    """LoRA's own weight as the reference: views stay views of the present weight, whoever writes to it."""
    model = reparametrised()
    twin = plain(model)
    for one in (model, twin):
        with torch.no_grad():
            weight = weights(one)[0]
            rows, column = weight.data[:2], weight.detach()[:, 1]
            weight.data.mul_(2)
            rows.mul_(3)
            torch._foreach_add_([weight.data[0], weight.data[4]], [rows[1], rows[0]])
            weight.view(-1).div_(2)
            weights(one)[0].t().mul_(-1)
            one.seen = rows.clone(), column.clone()
    for seen, expected in zip(model.seen, twin.seen, strict=True):
        torch.testing.assert_close(seen, expected, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(output(model), output(twin), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(weights(model)[0].detach().clone(), weights(twin)[0].detach(), atol=1e-14, rtol=1e-14)


def test_one_operator_writes_all_weights_or_none():
    model = reparametrised()
    before = everything(model)
    inside, outside = weights(model)[:2]
    with torch.no_grad(), pytest.raises(ValueError, match="span"):
        torch._foreach_copy_([inside, outside], [2 * inside.detach(), torch.ones_like(outside)])
    assert_same(everything(model), before)


ONES = torch.ones(8, 12, dtype=torch.float64)
ARGUMENTS = (
    (),
    (2.0,),
    (0,),
    (0, 1),
    (2 * ONES,),
    (ONES, 2 * ONES),
    (ONES > 0, 0.0),
    (0, torch.tensor([0, 1]), 0 * ONES[:2]),
    (0, torch.tensor([0]), 0.0),
    (torch.tensor([0]), 0 * ONES[0, :1]),
    (0 * ONES[:, :8], 0 * ONES),
)


@pytest.mark.parametrize("name", [name for name in dir(Tensor) if re.fullmatch(r"[a-z]\w*_", name)])
def test_every_method_in_place_has_its_effect_or_none(name):
    model = reparametrised()
    layer = first(model).lora_A["default"]
    rows = layer.factor.level1.detach().clone()
    for arguments in ARGUMENTS:
        with torch.no_grad():
            layer.factor.level1.copy_(rows)
        before, expected = layer.computed(), layer.computed()
        results = []
        for weight in (expected, layer.weight.detach()):
            torch.manual_seed(0)
            try:
                getattr(weight, name)(*arguments)
                results.append(None)
            except Exception as error:
                results.append(error)
        if results[1] is not None:
            assert torch.equal(layer.computed(), before)
            assert results[0] is not None or isinstance(results[1], ValueError)
        else:
            torch.testing.assert_close(layer.computed(), expected, atol=1e-12, rtol=1e-12)


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception]]] = {
    "functional_call": (
        lambda m: torch.func.functional_call(m, {key: v + 1 for key, v in m.state_dict().items()}, X),
        TypeError,
    ),
    "an assigned tensor": (lambda m: setattr(first(m).lora_A["default"], "weight", torch.ones(8, 12)), TypeError),
    "None": (lambda m: setattr(first(m).lora_A["default"], "weight", None), TypeError),
    "del": (lambda m: delattr(first(m).lora_A["default"], "weight"), AttributeError),
    "pruning": (lambda m: prune.l1_unstructured(first(m).lora_A["default"], "weight", 0.5), TypeError),
    "parametrization": (lambda m: nn.utils.parametrizations.orthogonal(first(m).lora_A["default"]), ValueError),
    "weight_norm": (lambda m: nn.utils.weight_norm(first(m).lora_A["default"]), KeyError),
    "set_module_tensor_to_device": (
        lambda m: set_module_tensor_to_device(first(m).lora_A["default"], "weight", "cpu", torch.ones(8, 12)),
        ValueError,
    ),
    "an optimizer": (lambda m: torch.optim.SGD([first(m).lora_A["default"].weight]), ValueError),
    "a hook": (lambda m: first(m).lora_A["default"].weight.register_hook(print), RuntimeError),
    "grad": (lambda m: setattr(first(m).lora_A["default"].weight, "grad", torch.ones(8, 12)), RuntimeError),
    "resize_": (lambda m: first(m).lora_A["default"].weight.data.resize_(2, 2), ValueError),
    "set_": (lambda m: first(m).lora_A["default"].weight.data.set_(torch.ones(8, 12).double()), ValueError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model = reparametrised()
    before = everything(model)
    write, error = REFUSED[name]
    with pytest.raises(error):
        write(model)
    assert_same(everything(model), before)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight, values: weight.copy_(values),
        lambda weight, values: weight.data.copy_(values),
        lambda weight, values: weight.data[:].copy_(values),
        lambda weight, values: setattr(weight, "data", values),
        lambda weight, values: torch._foreach_copy_([weight], [values]),
    ],
    ids=["copy_", ".data.copy_", "a view", ".data", "_foreach_"],
)
def test_an_adapter_that_gives_way_becomes_plain(write):
    """A further adapter of the same config takes any values, as it would without `reparametrize_lora`."""
    model = reparametrised()
    model.add_adapter("ref", model.peft_config["default"])
    layer = first(model)
    values = torch.randn(8, 12, dtype=torch.float64)
    with torch.no_grad():
        write(layer.lora_A["ref"].weight, values)
    assert torch.equal(layer.lora_A["ref"].weight, values)
    assert type(layer.lora_A["ref"]) is nn.Linear
    assert type(layer.lora_B["ref"]) is not nn.Linear
    model.set_adapter("ref")
    expected = plain(model)
    torch.testing.assert_close(output(model), output(expected), atol=1e-12, rtol=1e-12)
