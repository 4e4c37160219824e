import pytest
import torch

from wara_peft.linear_algebra.svd import largest_singular


def decaying(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix whose singular values fall, as those of a trained weight do."""
    k = min(m, n)
    return (torch.randn(m, k) @ torch.diag(0.9 ** torch.arange(k)) @ torch.randn(k, n)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(200, 240), (240, 200), (200, 200)])
def test_the_same_bits_as_pytorchs_randomised_svd_with_seed_0(m, n, dtype):
    matrix = decaying(m, n, dtype)
    found = largest_singular(matrix, 4, exact=False)
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(matrix, q=16, niter=6)
    assert all(map(torch.equal, found, (u[:, :4], s[:4], v[:, :4])))
    exact = torch.linalg.svdvals(matrix.double())[:4]
    torch.testing.assert_close(found[1].double(), exact, rtol=1e-5, atol=0)


def test_no_generator_of_any_device_is_seeded_or_advanced(monkeypatch):
    """`torch.manual_seed` would seed all GPUs too, also those that the matrix has nothing to do with."""
    seeded = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    matrix = decaying(200, 200, torch.float32)
    before = torch.get_rng_state()
    largest_singular(matrix, 4, exact=False)
    assert not seeded
    assert torch.equal(torch.get_rng_state(), before)
