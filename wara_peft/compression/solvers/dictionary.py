"""Dictionaries and sparse coefficients for the rows of a weight; nothing here knows of models.

W ≈ C D with atoms D, (k, n), and s values in each row of C, (m, k), so that ‖(W − C D) S‖_F is small for a root S of
the moment of the inputs, G = S Sᵀ. Whatever G is, the best D for given C is C⁺ W, so that S is never inverted.
Sources: CoSpaDi, arXiv 2509.22075 (K-SVD), and ROCKET, arXiv 2602.11008 (one shot); both with the weight transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...factorized.sparse_rows import scatter_values
from .low_rank import Metric, balance_factors, root_of

ITERATIONS = 20
POWER_ITERATIONS = 8
MAX_BYTES = 2**28
"""How much memory the matching pursuit of some rows at a time may take."""


class Dictionary(NamedTuple):
    """W ≈ C D: `places` of the values of C, (m, k) booleans, `values`, (m, s), and `atoms`, D, (k, n), in float64."""

    places: Tensor
    values: Tensor
    atoms: Tensor

    @property
    def weight(self) -> Tensor:
        return scatter_values(self.places, self.values) @ self.atoms


def ksvd(
    weight: Tensor,
    atoms: int,
    nonzeros: int,
    metric: Metric,
    iterations: int = ITERATIONS,
    start: Tensor | None = None,
) -> Dictionary:
    """Learn a dictionary by K-SVD with orthogonal matching pursuit, from rows of the weight.

    Each iteration finds the places and values of all rows anew, keeps those of a row where they were better before,
    and then fits atom after atom, with its values, to what the others leave (eight power iterations), so that the
    error never grows. An atom that no row uses becomes the row with the largest error. At last D = C⁺ W.

    Args:
        weight: W, (m, n).
        atoms: k, at most m.
        nonzeros: s, at most k.
        metric: on the weight's device; what weighs outputs is left out.
        iterations: how often.
        start: atoms to begin with, (k, n), in place of rows of the weight; where the metric has no inputs.
    """
    rows = whitened(weight, metric)
    generator = torch.Generator().manual_seed(0)
    first = torch.randperm(len(rows), generator=generator)[:atoms].to(rows.device)
    dictionary = _normalised(rows[first] if start is None else start.to(rows), rows)
    coefficients = torch.zeros(len(rows), atoms, dtype=rows.dtype, device=rows.device)
    for _ in range(iterations):
        coefficients = _better(rows, dictionary, matching_pursuit(rows, dictionary, nonzeros), coefficients, nonzeros)
        update_atoms(rows, dictionary, coefficients)
    return _in_weight_space(weight.double(), coefficients, nonzeros)


def one_shot(weight: Tensor, atoms: int, nonzeros: int, metric: Metric) -> Dictionary:
    """Principal directions as atoms, the most important coefficients of each row, and D = C⁺ W for these.

    With W S = U Σ Vᵀ the coefficients are U_k Σ_k. Those are kept that are large in the metric and, by their geometric
    mean, in the weight itself: |C_ji| ‖atom i‖^½. Before D is fitted the error is Σ dropped C² + Σ_{i>k} σ_i².
    What ROCKET does besides (rows with more values than others, and steps of gradient descent) is left out.

    Args:
        weight, atoms, nonzeros, metric: as in `ksvd`.
    """
    coefficients = principal_coefficients(weight, atoms, metric)
    energy = coefficients.square().sum(0)
    lengths = (coefficients.T @ weight.double()).norm(dim=1) / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    importance = coefficients.abs() * torch.where(energy > 0, lengths, 0).sqrt()
    chosen = importance.topk(nonzeros, dim=1).indices
    kept = torch.zeros_like(coefficients).scatter(1, chosen, coefficients.gather(1, chosen))
    return _in_weight_space(weight.double(), kept, nonzeros)


def principal_coefficients(weight: Tensor, atoms: int, metric: Metric) -> Tensor:
    """U_k Σ_k of W S, (m, k), in float64."""
    rows = whitened(weight, metric)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    found: Tensor = rows @ vectors.flip(1)[:, :atoms]
    missing = atoms - found.shape[1]  # there are no more directions than inputs
    return torch.nn.functional.pad(found, (0, missing)) if missing > 0 else found


def whitened(weight: Tensor, metric: Metric) -> Tensor:
    """W S, in float64."""
    if metric.inputs is None:
        return weight.double()
    root = root_of(metric.inputs)
    return weight.double() * root if root.dim() == 1 else weight.double() @ root


def matching_pursuit(rows: Tensor, dictionary: Tensor, nonzeros: int) -> Tensor:
    """Coefficients (m, k) with so many values in each row, by orthogonal matching pursuit of all rows together.

    Each step takes the atom that correlates most with what is left of a row, and fits all values of the row anew.

    Args:
        rows: (m, n).
        dictionary: (k, n), of atoms of length one.
    """
    gram, correlations = dictionary @ dictionary.T, rows @ dictionary.T
    together = max(1, MAX_BYTES // (rows.element_size() * nonzeros * (len(dictionary) + nonzeros)))
    found = [_pursued(some, gram, nonzeros) for some in torch.split(correlations, together)]
    return torch.cat(found)


def _pursued(correlations: Tensor, gram: Tensor, nonzeros: int) -> Tensor:
    """Of rows that correlate so with the atoms.

    For each row q_1, q_2, … are the chosen atoms made orthonormal one after the other. `directions` has q_t dᵀ for all
    atoms d, of which the entry of the next chosen atom is that of the Cholesky factor of the chosen ones' Gram matrix.
    """
    count, atoms = correlations.shape
    left = correlations.clone()
    directions = left.new_zeros(count, nonzeros, atoms)
    factor = torch.eye(nonzeros, dtype=left.dtype, device=left.device).repeat(count, 1, 1)
    along = left.new_zeros(count, nonzeros)  # of each row along q_t
    chosen = torch.zeros(count, nonzeros, dtype=torch.long, device=left.device)
    free = torch.ones_like(left)
    each = torch.arange(count, device=left.device)
    for step in range(nonzeros):
        atom = ((left.abs() + torch.finfo(left.dtype).tiny) * free).argmax(1)
        chosen[:, step] = atom
        free[each, atom] = 0
        before = directions[each, :step, atom]  # (count, step)
        # An atom that the others make up already gets a value of next to nothing.
        length = (gram[atom, atom] - before.square().sum(1)).clamp(min=1e-8).sqrt()
        new = (gram[atom] - torch.bmm(before[:, None], directions[:, :step])[:, 0]) / length[:, None]
        directions[:, step] = new
        factor[:, step, :step] = before
        factor[:, step, step] = length
        along[:, step] = left[each, atom] / length
        left -= along[:, step, None] * new
    values = torch.linalg.solve_triangular(factor.mT, along[:, :, None], upper=True)[:, :, 0]
    return torch.zeros_like(correlations).scatter(1, chosen, values)


def _better(rows: Tensor, dictionary: Tensor, new: Tensor, old: Tensor, nonzeros: int) -> Tensor:
    """Of each row the coefficients that leave less of it."""
    left = [(rows - coefficients @ dictionary).square().sum(1) for coefficients in (new, old)]
    return torch.where((left[0] <= left[1])[:, None], new, old)


def update_atoms(rows: Tensor, dictionary: Tensor, coefficients: Tensor) -> None:
    """Fit atom after atom, and its values where they are not zero, to what the others leave, in place."""
    left = rows - coefficients @ dictionary
    for index in range(len(dictionary)):
        users = coefficients[:, index].nonzero().flatten()
        if len(users) == 0:
            dictionary[index] = _normalised(left[left.square().sum(1).argmax()][None], rows)[0]
            continue
        alone = left[users] + coefficients[users, index, None] * dictionary[index]
        atom = dictionary[index]
        for _ in range(POWER_ITERATIONS):
            further = (alone @ atom) @ alone
            length = further.norm()
            if not bool(length > 0):
                break
            atom = further / length
        values = alone @ atom
        # A value that becomes zero would leave its place; it stays there, and counts for nothing.
        values = torch.where(values == 0, torch.finfo(values.dtype).tiny, values)
        dictionary[index] = atom
        coefficients[users, index] = values
        left[users] = alone - values[:, None] * atom


def _normalised(vectors: Tensor, rows: Tensor) -> Tensor:
    lengths = vectors.norm(dim=1, keepdim=True)
    usable = lengths > torch.finfo(vectors.dtype).eps * rows.norm()
    spare = torch.full_like(vectors, vectors.shape[1] ** -0.5)
    return torch.where(usable, vectors / lengths.clamp(min=torch.finfo(vectors.dtype).tiny), spare)


def _in_weight_space(weight: Tensor, coefficients: Tensor, nonzeros: int) -> Dictionary:
    """The same places with the best atoms; column i of C is as long as atom i."""
    # The largest by magnitude are those that there are; zeros fill up to the count.
    chosen = coefficients.abs().topk(nonzeros, dim=1).indices
    places = torch.zeros_like(coefficients, dtype=torch.bool).scatter(1, chosen, True)
    coefficients, atoms = balance_factors(coefficients, torch.linalg.pinv(coefficients, rtol=1e-10) @ weight)
    return Dictionary(places, coefficients[places].view(len(weight), nonzeros), atoms)
