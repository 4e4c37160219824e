"""Settings for all tests."""

import os

import pytest
import torch

# Nothing here may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Models this small spend their time waiting for each other's threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
