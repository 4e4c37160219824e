"""Singular values and truncations of low-rank products, against NumPy's SVD of the dense product in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wara_peft.base_layers.kinds import KINDS
from wara_peft.layers.low_rank_update import LowRankUpdate
from wara_peft.linear_algebra.truncation import decompose, rank_for_energy, truncation_energy

# out, in, rank: wide, tall, and ranks larger than the matrix
SHAPES = [(20, 12, 5), (7, 30, 4), (6, 5, 9), (1, 8, 3)]


def factors(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    out, in_, rank = shape
    factor_a, factor_b = torch.randn(rank, in_), torch.randn(out, rank)
    return factor_a, factor_b, factor_b.double().numpy() @ factor_a.double().numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_truncated_svd(shape):
    factor_a, factor_b, dense = factors(shape)
    left, values, right = np.linalg.svd(dense, full_matrices=False)
    parts = decompose(factor_a, factor_b)
    common = min(len(values), len(parts.values))
    np.testing.assert_allclose(parts.values[:common], values[:common], atol=1e-10)
    for rank in range(1, common + 1):
        a, b = parts.truncated(rank)
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        best = np.linalg.norm(dense - (left[:, :rank] * values[:rank]) @ right[:rank])
        assert np.linalg.norm(dense - (b @ a).numpy()) == pytest.approx(best, abs=1e-9)
        lost, whole = truncation_energy([parts], rank)
        assert lost == pytest.approx(best**2, abs=1e-9)
        assert whole == pytest.approx(np.linalg.norm(dense) ** 2)


def test_ranks_beyond_the_matrix_are_filled_up_with_zeros():
    factor_a, factor_b, dense = factors((6, 5, 3))
    a, b = decompose(factor_a, factor_b).truncated(8)
    assert (a.shape, b.shape) == ((8, 5), (6, 8))
    assert not a[3:].any()
    assert not b[:, 3:].any()
    np.testing.assert_allclose((b @ a).numpy(), dense, atol=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_rank_for_energy_is_the_smallest_that_keeps_the_share(share):
    factor_a, factor_b, dense = factors((20, 12, 8))
    energy = np.linalg.svd(dense, compute_uv=False) ** 2
    kept = np.cumsum(energy) / energy.sum()
    rank = rank_for_energy([decompose(factor_a, factor_b)], share)
    assert kept[rank - 1] >= share - 1e-12
    assert rank == 1 or kept[rank - 2] < share


def test_zero_has_rank_one_and_no_error():
    parts = [decompose(torch.randn(3, 5), torch.zeros(4, 3))]
    assert rank_for_energy(parts, 0.9) == 1
    assert truncation_energy(parts, 1) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "kernel", "expected"),
    [("Linear", (), (6, 4)), ("Conv1D", (), (4, 6)), ("Embedding", (), (4, 6)), ("Conv2d", (3, 2), (6, 4, 3, 2))],
)
def test_dense_has_the_orientation_of_the_layer(kind, kernel, expected):
    factor_a, factor_b = torch.randn(2, 4, *kernel), torch.randn(6, 2)
    dense = LowRankUpdate(KINDS[kind], factor_a, factor_b).dense()
    product = torch.einsum("mr,rn...->mn...", factor_b, factor_a)
    torch.testing.assert_close(dense, product.T if kind in ("Conv1D", "Embedding") else product)
    assert dense.shape == expected


def test_groups_are_decomposed_each_by_itself():
    update = LowRankUpdate(KINDS["Conv1d"], torch.randn(5, 4, 3), torch.randn(6, 5), groups=2)
    dense = update.dense().double().flatten(1).numpy()
    for part, rows in zip(update.decomposition(), (dense[:3], dense[3:]), strict=True):
        np.testing.assert_allclose(part.values[:3], np.linalg.svd(rows, compute_uv=False), atol=1e-5)
