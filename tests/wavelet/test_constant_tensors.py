"""Constant tensors: made on the device of what they meet, not kept of a passing mode, few, shared, and given back."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.references import inverse_transform, synthesis_matrix, transform
from wara_peft.forms import SubbandFactor
from wara_peft.forms.token_grid import TokenGrid
from wara_peft.forms.token_mixing import TokenMixing, grid_subbands
from wara_peft.wavelet import Axis, adjoint, subbands, synthesis, synthesis_at
from wara_peft.wavelet.constant_tensors import _all_shared

# one for each way of the transforms
WAVELETS = ("haar", "db3")
LEVELS = 2
# Every test takes one that no other has used, so that nothing is kept for it yet.
LENGTHS = itertools.count(60, 2**LEVELS)


@pytest.fixture(autouse=True, scope="module")
def nothing_of_other_tests() -> None:
    """Constants may be held by cycles that earlier tests have left."""
    gc.collect()


def use(name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Everything that takes constants: both transforms, single columns, and the grid's projections of the rows."""
    length = rows.shape[1] << LEVELS
    axis = Axis(name, length, ("", "", "ad"))
    # the device by name: an explicit one is right whatever the default is
    positions = torch.tensor([3, 0, length - 1], device=rows.device)
    whole = synthesis([None, None, rows], axis, 1)
    columns = synthesis_at([None, None, rows], axis, positions)
    (back,) = (part for part in adjoint(whole, axis, 1) if part is not None)
    mixing = TokenMixing("proj", TokenGrid((length, 1), 0), name, grid_subbands(1))
    tokens = whole[0].reshape(1, length, 1).expand(-1, -1, len(mixing.channels))
    return whole, columns, back, mixing(tokens)


def check(name: str, rows: torch.Tensor) -> None:
    """The same by PyWavelets."""
    whole, columns, back, mixed = (found.detach().numpy() for found in use(name, rows))
    length = rows.shape[1] << LEVELS
    matrices = [synthesis_matrix(name, length, LEVELS, band) for band in "ad"]
    expected = np.stack([matrix @ row for matrix, row in zip(matrices, rows.numpy(), strict=True)])
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    np.testing.assert_allclose(columns, expected[:, [3, 0, length - 1]], atol=1e-12)
    projected = np.stack([matrix.T @ row for matrix, row in zip(matrices, expected, strict=True)])
    np.testing.assert_allclose(back, projected, atol=1e-12)
    grid = expected[0][:, None]
    bands = transform(grid, name, 1)
    parts = [inverse_transform({band.name: bands[band.name]}, name, grid.shape, 1)[:, 0] for band in grid_subbands(1)]
    np.testing.assert_allclose(mixed[0], np.stack(parts, axis=1), atol=1e-12)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(2, next(LENGTHS) >> LEVELS, dtype=torch.float64)


@pytest.fixture(params=["context", "set"])
def other_default_device(request):
    """A default device on which nothing has values, given in either way."""
    if request.param == "context":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)


@pytest.mark.parametrize("name", WAVELETS)
def test_first_use_under_another_default_device(name, rows, other_default_device):
    assert {found.device.type for found in use(name, rows)} == {"cpu"}
    check(name, rows)


@pytest.mark.parametrize("name", WAVELETS)
def test_what_other_default_devices_saw_serves_later(name, rows):
    with torch.device("meta"):
        use(name, rows)
    check(name, rows)


@pytest.mark.parametrize("order", ["fake first", "real first"])
@pytest.mark.parametrize("name", WAVELETS)
def test_fake_tensors(name, rows, order):
    if order == "real first":
        use(name, rows)
    mode = FakeTensorMode()
    fake = mode.from_tensor(rows)
    with mode:
        inside = use(name, fake)
    for found in inside:
        assert isinstance(found, FakeTensor)
    assert [found.shape for found in inside] == [found.shape for found in use(name, rows)]
    check(name, rows)


@pytest.mark.parametrize("name", WAVELETS)
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(lambda call, rows: torch.func.vmap(call)(rows.expand(3, -1, -1)), id="vmap"),
        pytest.param(lambda call, rows: torch.func.grad(lambda x: call(x)[0].sum())(rows), id="grad"),
        pytest.param(lambda call, rows: torch.func.functionalize(call)(rows), id="functionalize"),
        pytest.param(lambda call, rows: make_fx(call)(rows), id="make_fx"),
        pytest.param(lambda call, rows: make_fx(call, tracing_mode="fake")(rows), id="make_fx fake"),
        pytest.param(lambda call, rows: torch.inference_mode()(call)(rows), id="inference mode"),
        pytest.param(lambda call, rows: torch.autocast("cpu", torch.bfloat16)(call)(rows), id="autocast"),
    ],
)
def test_what_modes_and_transforms_saw_serves_later(name, rows, first):
    first(lambda x: use(name, x), rows)
    check(name, rows)
    rows.requires_grad_()
    synthesis([None, None, rows], Axis(name, rows.shape[1] << LEVELS, ("", "", "ad")), 1).sum().backward()
    expected = np.stack([synthesis_matrix(name, rows.shape[1] << LEVELS, LEVELS, band).sum(0) for band in "ad"])
    np.testing.assert_allclose(rows.grad.numpy(), expected, atol=1e-12)


# (out, in) of q, k, v, o, gate, up and down in each of the layers of a Llama of 8B parameters
LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
LAYERS = 32


def kept_tensors() -> list[torch.Tensor]:
    """All constants that some object holds."""
    return [tensor for shared in list(_all_shared.values()) for tensor in shared.tensors]


def kept_bytes() -> int:
    """Their bytes, each storage once."""
    storages = [tensor.untyped_storage() for tensor in kept_tensors()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def names(levels: int) -> list[str]:
    return [band.name for band in subbands(levels) if band.level]


@torch.no_grad()
def use_factor(factor: SubbandFactor) -> None:
    """Compute what a training step does, without gradients."""
    adjoint(factor(), factor.axis, factor.dim)


def llama_8b(wavelet: str, levels: int, ranks: Iterator[int], layers: int = LAYERS) -> list[SubbandFactor]:
    """The factors of its adapter on the meta device, each used once."""
    factors = []
    for out_features, in_features in LLAMA_8B * layers:
        own = {name: next(ranks) for name in names(levels)}
        for length, dim in ((in_features, 1), (out_features, 0)):
            with torch.device("meta"):
                factors.append(SubbandFactor(wavelet, levels, length, own, dim))
            use_factor(factors[-1])
    return factors


@pytest.mark.parametrize(
    ("wavelet", "levels"),
    [
        pytest.param(*case, marks=() if case in (("haar", 1), ("db4", 1)) else pytest.mark.slow)
        for case in itertools.product(("haar", "db2", "db4"), (1, 2, 3))
    ],
)
def test_constants_of_different_ranks_take_a_tenth_of_the_adapter(wavelet, levels):
    before = kept_bytes()
    draw = random.Random(f"{wavelet} {levels}")
    factors = llama_8b(wavelet, levels, iter(lambda: draw.randint(1, 7), 0))
    kept = kept_bytes() - before
    adapter = sum(parameter.nbytes for factor in factors for parameter in factor.parameters())
    assert 0 < kept <= adapter / 10
    if (wavelet, levels) == ("haar", 1):  # a pair of numbers for each row
        assert kept <= 8 * sum(factor.rank for factor in factors)
    del factors
    assert kept_bytes() == before


@pytest.mark.parametrize("levels", [1, 3])
def test_constants_of_equal_ranks_are_the_same_whatever_the_rank(levels):
    before = kept_bytes()
    of_one = llama_8b("db4", levels, itertools.repeat(1), layers=1)
    kept = kept_bytes() - before
    of_others = [llama_8b("db4", levels, itertools.repeat(rank), layers=2) for rank in (1, 2, 7)]
    assert kept_bytes() - before == kept > 0
    del of_one, of_others
    assert kept_bytes() == before


def test_devices_are_left_with_nothing():
    before = kept_bytes()
    factor = SubbandFactor("db4", 2, next(LENGTHS), dict.fromkeys(names(2), 2), 1)
    for parameter in factor.parameters():
        torch.nn.init.ones_(parameter)
    use_factor(factor)
    on_cpu = kept_bytes() - before
    factor.to("meta")
    assert kept_bytes() == before
    use_factor(factor)
    assert kept_bytes() - before == on_cpu  # in float32 as well
    factor.to_empty(device="cpu").double()
    use_factor(factor)
    assert {found.device.type for shared in factor.axis.constants._held.values() for found in shared.tensors} == {
        "cpu"
    }
    del factor
    assert kept_bytes() == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda factor: pickle.loads(pickle.dumps(factor))])
@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 2, 3, 4)])
@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_copies_share_constants_and_may_outlive_the_original(wavelet, ranks, duplicate):
    before = kept_bytes()
    length = next(LENGTHS)
    factor = SubbandFactor(wavelet, 1, length, dict(zip(names(1), ranks, strict=True)), 1)
    torch.nn.init.normal_(factor.level1)
    use_factor(factor)
    kept = kept_bytes() - before
    assert kept > 0
    tensors = [weakref.ref(tensor) for tensor in kept_tensors()]
    copied = duplicate(factor)
    use_factor(copied)
    assert kept_bytes() - before == kept
    rows = factor.level1.detach().double().numpy().copy()
    del factor
    found = copied().detach()
    assert kept_bytes() - before == kept
    matrices = {band: synthesis_matrix(wavelet, length, 1, band) for band in "ad"}
    expected = [matrices[band] @ row for band, row in zip(copied.axis.bands[1], rows, strict=True)]
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-5)
    del copied, found
    assert kept_bytes() == before
    assert sum(tensor() is not None for tensor in tensors) == len(kept_tensors())  # nobody else holds the others


def test_threads_share_constants_and_give_them_back():
    before = kept_bytes()
    length = 64 * next(LENGTHS)
    ready, done = threading.Barrier(4), threading.Barrier(5)
    sums = []

    def work() -> None:
        factor = SubbandFactor("db4", 1, length, dict.fromkeys(names(1), 3), 1)
        torch.nn.init.ones_(factor.level1)
        ready.wait()
        use_factor(factor)
        sums.append(float(factor().detach().double().sum()))
        done.wait()  # counted here
        done.wait()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    done.wait()
    kept = kept_bytes() - before
    done.wait()
    for thread in threads:
        thread.join()
    assert kept_bytes() == before
    factor = SubbandFactor("db4", 1, length, dict.fromkeys(names(1), 3), 1)
    torch.nn.init.ones_(factor.level1)
    use_factor(factor)
    assert kept_bytes() - before == kept  # of four as of one
    # ones in band a are √2 at each of two samples a coefficient, over two; in band d they cancel out
    np.testing.assert_allclose(sums, 6 * length / 2 * np.sqrt(2), rtol=1e-5)


def test_single_columns_keep_nothing():
    before = kept_bytes()
    axis = Axis("db4", next(LENGTHS), ("", "", "aad"))
    rows = torch.ones(3, axis.sizes[2])
    synthesis_at([None, None, rows], axis, torch.tensor([1, 5]))
    assert kept_bytes() > before
    del axis, rows
    assert kept_bytes() == before
