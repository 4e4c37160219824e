"""Settings for all tests."""

import os
from collections import Counter

import pytest
import torch

from wara_peft.forms import SubbandFactor

# Nothing here may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Models this small spend their time waiting for each other's threads: they get one, unless the environment says more.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def syntheses(monkeypatch) -> Counter:
    """How often each factor has been synthesised."""
    counts: Counter = Counter()
    synthesise = SubbandFactor.synthesise

    def counted(self: SubbandFactor, *args):
        counts[self] += 1
        return synthesise(self, *args)

    monkeypatch.setattr(SubbandFactor, "synthesise", counted)
    return counts
