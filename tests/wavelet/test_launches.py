"""How many operations an adapted Linear starts: what an accelerator's small steps are bound by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from wara_peft import WaRAConfig
from wara_peft.wavelet import Axis, synthesis

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LORA = {"r": 16, "lora_alpha": 16}


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import launches

    return launches


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(2048, 2048), (2048, 8192), (2048, 512)])
@pytest.mark.parametrize(("levels", "share", "most"), [(1, 4 / 3, 16), (3, 8 / 3, 32)])
@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym5"])
def test_forward_and_backward_of_an_adapted_linear(launches, wavelet, levels, share, most, shape, autocast):
    if autocast:  # which is counted on the CPU, where full sizes take half a minute
        shape = tuple(size // 4 for size in shape)
    found = launches.added(lambda: WaRAConfig(r=4, levels=levels, wavelet=wavelet), shape, "meta", autocast)
    lora = launches.added(lambda: LoraConfig(**LORA), shape, "meta", autocast)
    assert found <= lora * share
    assert autocast or found <= most


def test_what_is_counted(launches):
    # By hand: two products forward, scaling and sum; scaling, four products and the sum of two gradients backward.
    assert launches.added(lambda: LoraConfig(**LORA), (64, 64), "meta", autocast=False) == 4 + 6

    def step():
        x = torch.ones(3, 4)  # one
        y = (x.T.reshape(2, 6) + 1).view(3, 4)  # a copy, and a sum
        torch.add(y, 1, out=x)  # one

    assert launches.operations(step) == 4


def test_a_transform_of_any_number_of_levels_is_one_kernel(launches):
    for dim, most in ((1, 2), (0, 2)):  # levels joined to a table, and their sums
        for levels in (1, 2, 3, 5):
            axis = Axis("db4", 64, ("", *("ad",) * levels))
            shapes = [(2, size) if dim == 1 else (size, 2) for size in axis.sizes[1:]]
            rows = [None, *(torch.ones(shape, device="meta") for shape in shapes)]
            synthesis(rows, axis, dim)
            assert launches.operations(lambda axis=axis, rows=rows, dim=dim: synthesis(rows, axis, dim)) <= most
