"""Settings for all tests."""

import getpass
import os
import tempfile
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

# Nothing here may reach the network. huggingface_hub reads this when it is imported, so nothing above may import it.
os.environ["HF_HUB_OFFLINE"] = "1"
# The cache of torch.compile does not know this setting: code that was made for other instructions would not compile.
if "ATEN_CPU_CAPABILITY" in os.environ:
    cache = f"torchinductor_{getpass.getuser()}_{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), cache)  # importing torch may set it
# Models this small spend their time waiting for each other's threads: they get one, unless the environment says more.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def seed() -> None:
    # `torch.manual_seed` also keeps a traceback for each kind of device that was never used: a millisecond.
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let each test start with nothing compiled, as the graph breaks of one would change what the next compiles."""
    yield
    if request.node.get_closest_marker("compiler"):
        torch.compiler.reset()


@pytest.fixture
def syntheses(monkeypatch) -> Counter:
    """How often each factor has been synthesised."""
    from wara_peft.forms import SubbandFactor

    counts: Counter = Counter()
    synthesise = SubbandFactor.synthesise

    def counted(self: SubbandFactor, *args):
        counts[self] += 1
        return synthesise(self, *args)

    monkeypatch.setattr(SubbandFactor, "synthesise", counted)
    return counts
