"""Dictionary learning beside NumPy: pursuit, updates of atoms, and the identities of the one-shot variant."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from wara_peft.compression.solvers.dictionary import (
    ksvd,
    matching_pursuit,
    one_shot,
    principal_coefficients,
    update_atoms,
    whitened,
)
from wara_peft.compression.solvers.low_rank import Metric, low_rank


def moment_of(n: int, count: int = 80) -> Tensor:
    x = torch.randn(count, n, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    return x.T @ x / count


def unit_rows(count: int, n: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, n, dtype=torch.float64), dim=1)


def pursued_by_hand(row: np.ndarray, atoms: np.ndarray, count: int) -> np.ndarray:
    chosen: list[int] = []
    left = row
    for _ in range(count):
        correlations = np.abs(atoms @ left)
        correlations[chosen] = -1
        chosen.append(int(correlations.argmax()))
        values = np.linalg.lstsq(atoms[chosen].T, row, rcond=None)[0]
        left = row - values @ atoms[chosen]
    found = np.zeros(len(atoms))
    found[chosen] = values
    return found


class TestPursuit:
    @pytest.mark.parametrize("nonzeros", [1, 3, 7])
    def test_beside_one_row_at_a_time(self, nonzeros: int) -> None:
        rows, atoms = torch.randn(17, 12, dtype=torch.float64), unit_rows(20, 12)
        found = matching_pursuit(rows, atoms, nonzeros)
        expected = [pursued_by_hand(row, atoms.numpy(), nonzeros) for row in rows.numpy()]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
        left = rows - found @ atoms
        assert float(((left @ atoms.T) * (found != 0)).abs().max()) < 1e-10  # orthogonal to what was chosen

    def test_some_rows_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows, atoms = torch.randn(17, 12, dtype=torch.float64), unit_rows(20, 12)
        expected = matching_pursuit(rows, atoms, 4)
        monkeypatch.setattr("wara_peft.compression.solvers.dictionary.MAX_BYTES", 3000)
        torch.testing.assert_close(matching_pursuit(rows, atoms, 4), expected)

    def test_more_values_than_dimensions(self) -> None:
        rows, atoms = torch.randn(6, 3, dtype=torch.float64), unit_rows(8, 3)
        found = matching_pursuit(rows, atoms, 5)
        torch.testing.assert_close(found @ atoms, rows, rtol=0, atol=1e-6)


class TestAtoms:
    def test_an_update_never_adds_to_the_error(self) -> None:
        rows, atoms = torch.randn(40, 10, dtype=torch.float64), unit_rows(16, 10)
        coefficients = matching_pursuit(rows, atoms, 3)
        coefficients[:, 5] = 0  # an atom without users
        places = coefficients != 0
        errors = []
        for _ in range(4):
            errors.append(float((rows - coefficients @ atoms).square().sum()))
            update_atoms(rows, atoms, coefficients)
            assert torch.equal(coefficients != 0, places)
            torch.testing.assert_close(atoms.norm(dim=1), torch.ones(16).double())
        assert all(after < before for before, after in itertools.pairwise(errors))

    def test_of_sparse_rows_it_loses_far_less_than_low_rank_at_equal_size(self) -> None:
        atoms = unit_rows(12, 16)
        coefficients = torch.zeros(200, 12).double()
        for row in coefficients:
            row[torch.randperm(12)[:2]] = torch.randn(2).double() + 2
        weight = coefficients @ atoms
        found = ksvd(weight, 12, 2, Metric(), iterations=30)
        rank = (12 * 16 + 2 * 200) // (200 + 16)
        assert float((weight - found.weight).square().sum()) < 0.3 * low_rank(weight, rank, Metric()).lost


@pytest.mark.parametrize("shape", [(30, 14), (14, 30)])
class TestDictionaries:
    def test_ksvd(self, shape: tuple[int, int]) -> None:
        weight, metric = torch.randn(shape, dtype=torch.float64), Metric(moment_of(shape[1]))
        errors = []
        for iterations in (1, 4, 12):
            found = ksvd(weight, 10, 4, metric, iterations)
            assert found.places.shape == (shape[0], 10) and bool((found.places.sum(1) == 4).all())
            difference = weight - found.weight
            coefficients = torch.zeros(shape[0], 10).double().masked_scatter(found.places, found.values)
            torch.testing.assert_close(
                difference.T @ coefficients, torch.zeros(shape[1], 10).double(), atol=1e-9, rtol=0
            )
            errors.append(float(metric.error(difference)))
        assert errors[0] > errors[1] > errors[2] > low_rank(weight, 10, metric).lost

    def test_one_shot_loses_what_it_drops(self, shape: tuple[int, int]) -> None:
        weight, metric = torch.randn(shape, dtype=torch.float64), Metric(moment_of(shape[1]))
        found = one_shot(weight, 10, 4, metric)
        assert bool((found.places.sum(1) == 4).all())
        coefficients = principal_coefficients(weight, 10, metric)
        root = np.linalg.cholesky(metric.inputs.numpy())
        u, s, vt = np.linalg.svd(weight.numpy() @ root, full_matrices=False)
        np.testing.assert_allclose(coefficients.abs().numpy(), np.abs(u[:, :10] * s[:10]), atol=1e-7)
        kept = np.where(found.places.numpy(), coefficients.numpy(), 0)
        directions = (vt[:10].T * np.sign((u[:, :10] * coefficients.numpy()).sum(0))).T
        before = np.linalg.norm(weight.numpy() @ root - kept @ directions) ** 2
        dropped = (coefficients.numpy() ** 2).sum() - (kept**2).sum()
        assert before == pytest.approx(dropped + (s[10:] ** 2).sum(), rel=1e-6)
        assert low_rank(weight, 10, metric).lost < float(metric.error(weight - found.weight)) < before

    @pytest.mark.parametrize("count", [80, 6])
    def test_with_all_values_it_is_the_low_rank_solution(self, shape: tuple[int, int], count: int) -> None:
        weight, metric = torch.randn(shape, dtype=torch.float64), Metric(moment_of(shape[1], count))
        found = one_shot(weight, 5, 5, metric)
        expected = low_rank(weight, 5, metric)
        torch.testing.assert_close(found.weight, expected.up @ expected.down, rtol=0, atol=1e-6)

    def test_without_a_metric_rows_are_as_they_are(self, shape: tuple[int, int]) -> None:
        weight = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(whitened(weight, Metric()), weight)
        even = Metric(torch.eye(shape[1]).double() * 4)
        torch.testing.assert_close(ksvd(weight, 8, 3, Metric(), 3).weight, ksvd(weight, 8, 3, even, 3).weight)
