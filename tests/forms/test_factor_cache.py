"""A call drops a kept factor as soon as one of the tensors that it is made from has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from wara_peft import WaRAConfig
from wara_peft.forms import SubbandFactor, TiedFactor
from wara_peft.forms.experts import ExpertsFactor
from wara_peft.forms.factor_cache import factors_of_one_call
from wara_peft.forms.factors import IN_DIM, OUT_DIM
from wara_peft.forms.shared import SharedFactor
from wara_peft.forms.tiny import Basis, Core, TinyFactor


def _fill(module: nn.Module) -> nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        nn.init.normal_(tensor)
    return module.eval()


def _tiny() -> nn.Module:
    ranks = {"aa1": 2, "dd1": 2}
    basis, core = Basis(1, (8, 8), ranks, saved=True), Core(ranks, diagonal=False)
    return nn.ModuleList([TinyFactor("db2", 1, 8, ranks, OUT_DIM, basis, core), basis, core])


RANKS = {"aa2": 1, "ad1": 2, "aa0": 1}
FACTORS = {
    "subband": lambda: nn.ModuleList([SubbandFactor("db2", 2, 8, RANKS, IN_DIM)]),
    "kernel": lambda: nn.ModuleList([SubbandFactor("db2", 2, 8, RANKS, IN_DIM, (3,))]),
    "experts": lambda: nn.ModuleList([ExpertsFactor("db2", 2, 8, RANKS, OUT_DIM, 3)]),
    "shared": lambda: nn.ModuleList([SharedFactor("db2", 1, 8, {"aa1": 2, "dd1": 2}, OUT_DIM)]),
    "tiny": _tiny,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FACTORS)
def test_every_tensor_of_every_kind_of_factor_is_watched(kind, tied):
    parts = _fill(FACTORS[kind]()).double()
    factor = TiedFactor(parts[0], transposed=True) if tied and kind not in ("kernel", "experts") else parts[0]
    tensors = [*parts.named_parameters(), *parts.named_buffers()]
    tensors = [(name, tensor) for name, tensor in tensors if ".A_" not in name]  # Â's, and this is B̂
    assert tensors
    with torch.no_grad(), factors_of_one_call(parts):
        for name, tensor in tensors:
            factor()
            kept = factor()
            assert factor().data_ptr() == kept.data_ptr()
            before = kept.clone()
            tensor.mul_(-1.5)
            now = factor()
            torch.testing.assert_close(now, copy.deepcopy(factor)(), rtol=0, atol=0)
            assert (now - before).abs().max() > 1e-3, name


def test_gains_of_a_grid_are_not_kept():
    model = nn.Sequential(nn.Linear(6, 6))
    fields = {"grid_size": (4, 4), "num_prefix_tokens": 0, "grid_pairs": "shared", "init_weights": False}
    model = get_peft_model(model, WaRAConfig(target_modules=["0"], form="grid", r=2, **fields)).double()
    x = torch.randn(1, 16, 6, dtype=torch.double)
    layer = model.base_model.model[0]
    with torch.no_grad(), factors_of_one_call(model):
        base = layer.base_layer(x)
        change = [(layer(x) - base) for _ in range(3)][-1]
        layer.wara_gain["default"].mul_(3)
        torch.testing.assert_close(layer(x) - base, 3 * change)


def test_a_step_of_an_optimizer_compiles_and_is_seen():
    factor = _fill(SubbandFactor("haar", 1, 8, {"aa1": 2}, IN_DIM))
    optimizer = torch.optim.SGD(factor.parameters(), lr=1.0)
    step = torch.compile(optimizer.step, backend="eager")
    factor.level1.grad = torch.ones_like(factor.level1)
    with torch.no_grad(), factors_of_one_call(factor):
        before = [factor() for _ in range(3)][-1]
        step()
        torch.testing.assert_close(before - factor(), torch.full_like(before, 0.5**0.5))
