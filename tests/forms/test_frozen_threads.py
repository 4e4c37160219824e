"""`frozen_factors` in several threads over one model, as a threaded server opens it."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model

from tests.references import Mlp
from wara_peft import WaRAConfig, frozen_factors
from wara_peft.forms import SubbandFactor


@pytest.mark.parametrize("form", ["subband", "tiny"])
def test_threads_enter_and_leave_at_random(form):
    config = WaRAConfig(form=form, r=2, wavelet="db2", target_modules=["up", "down"], init_weights=False)
    model = get_peft_model(Mlp(), config).eval()
    x = torch.randn(3, 12)
    with torch.no_grad():
        expected = model(x)
    start = threading.Barrier(8)

    def serve(seed: int) -> None:
        choose = random.Random(seed)
        start.wait()
        for _ in range(60):
            with torch.no_grad(), frozen_factors(model):
                for _ in range(choose.randrange(3)):
                    torch.testing.assert_close(model(x), expected)
                if choose.random() < 0.2:
                    model.to(torch.float32)
                if choose.random() < 0.2:
                    with frozen_factors(model):
                        torch.testing.assert_close(model(x), expected)

    with ThreadPoolExecutor(8) as threads:
        for served in [threads.submit(serve, seed) for seed in range(8)]:
            served.result()
    assert all(factor.keeping._frozen is None for factor in model.modules() if isinstance(factor, SubbandFactor))
    model(x).sum().backward()  # trains again


def test_the_last_to_leave_ends_the_scope():
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], init_weights=False)).eval()
    x = torch.randn(3, 12)
    first, second = frozen_factors(model), frozen_factors(model)
    with torch.no_grad():
        first.__enter__()
        before = model(x)
        second.__enter__()
        first.__exit__(None, None, None)
        model.base_model.model.up.wara_B["default"].level1.zero_()
        assert torch.equal(model(x), before)
        second.__exit__(None, None, None)
        assert not torch.allclose(model(x), before)
