"""Dictionaries and sparse coefficients for the rows of a weight. This file knows nothing of models.

W, (m, n), is approximated by C D. The rows of D, (k, n), are the atoms, and each row of C, (m, k), has s values that
are not zero. The error ‖(W − C D) S‖_F is measured with a root S of the moment of the inputs, G = S Sᵀ. For given C
the best D is C⁺ W, for every G, so S is never inverted.
Sources: CoSpaDi, arXiv 2509.22075 (K-SVD), and ROCKET, arXiv 2602.11008 (one shot); both transpose the weight.
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
"""How much memory matching pursuit may take; it handles as many rows at a time as fit."""


class Dictionary(NamedTuple):
    """An approximation C D of a weight, in float64.

    `places`, (m, k) booleans, says where C has its values; `values`, (m, s), are these; and `atoms` is D, (k, n).
    """

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

    Each iteration has two parts. First it finds places and values for all rows again; a row whose earlier coefficients
    were better keeps them. Then it fits one atom after the other, together with its values, to the part of the rows
    that the other atoms do not explain (by eight power iterations). So the error never grows. An atom that no row uses
    is set to the row with the largest error. After the last iteration D = C⁺ W.

    Args:
        weight: W, (m, n).
        atoms: k, at most m.
        nonzeros: s, at most k.
        metric: weighs the error, on the weight's device. Only its `inputs` are used.
        iterations: number of iterations.
        start: atoms to begin with, (k, n), in place of rows of the weight. Only for a metric without inputs.
    """
    rows = whitened(weight, metric)
    # The generator of the CPU gives the same atoms on every device.
    generator = torch.Generator().manual_seed(0)
    first = torch.randperm(len(rows), generator=generator)[:atoms].to(rows.device)
    dictionary = _normalised(rows[first] if start is None else start.to(rows), rows)
    coefficients = torch.zeros(len(rows), atoms, dtype=rows.dtype, device=rows.device)
    for _ in range(iterations):
        coefficients = _better(rows, dictionary, matching_pursuit(rows, dictionary, nonzeros), coefficients, nonzeros)
        update_atoms(rows, dictionary, coefficients)
    return _in_weight_space(weight.double(), coefficients, nonzeros)


def one_shot(weight: Tensor, atoms: int, nonzeros: int, metric: Metric) -> Dictionary:
    """Make a dictionary without iterations: keep the most important principal coefficients of each row, and fit D.

    With W S = U Σ Vᵀ the coefficients are U_k Σ_k. A coefficient's importance is |C_ji| ‖atom i‖^½, with atom i in the
    space of the weight: the geometric mean of its size in the metric and its size in the weight. The s most important
    ones of each row are kept, and then D = C⁺ W. Before D is fitted the error is Σ dropped C² + Σ_{i>k} σ_i².
    ROCKET also gives some rows more values than others, and takes steps of gradient descent; this function does not.

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
    """Give U_k Σ_k, (m, k), for the SVD of W S, in float64."""
    rows = whitened(weight, metric)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    found: Tensor = rows @ vectors.flip(1)[:, :atoms]
    missing = atoms - found.shape[1]  # there are only n directions, and k may be larger
    return torch.nn.functional.pad(found, (0, missing)) if missing > 0 else found


def whitened(weight: Tensor, metric: Metric) -> Tensor:
    """Give W S, in float64."""
    if metric.inputs is None:
        return weight.double()
    root = root_of(metric.inputs)
    return weight.double() * root if root.dim() == 1 else weight.double() @ root


def matching_pursuit(rows: Tensor, dictionary: Tensor, nonzeros: int) -> Tensor:
    """Give coefficients (m, k) with `nonzeros` values in each row, by orthogonal matching pursuit.

    Each step adds, to each row, the atom that correlates most with the row's remainder, and fits all values of the row
    again. The steps run for many rows at once.

    Args:
        rows: rows to approximate, (m, n).
        dictionary: atoms, (k, n), each of length one.
        nonzeros: s.
    """
    gram, correlations = dictionary @ dictionary.T, rows @ dictionary.T
    together = max(1, MAX_BYTES // (rows.element_size() * nonzeros * (len(dictionary) + nonzeros)))
    found = [_pursued(some, gram, nonzeros) for some in torch.split(correlations, together)]
    return torch.cat(found)


def _pursued(correlations: Tensor, gram: Tensor, nonzeros: int) -> Tensor:
    """Run the matching pursuit for some rows, from their correlations with the atoms, (rows, k).

    For each row, q_1, q_2, … are its chosen atoms, made orthonormal one after the other. `directions` holds q_t dᵀ for
    all atoms d. The entries for the chosen atoms are also those of the Cholesky factor of their Gram matrix. So the
    pursuit needs only correlations and the Gram matrix of the atoms, and neither rows nor atoms themselves.
    """
    count, atoms = correlations.shape
    left = correlations.clone()
    directions = left.new_zeros(count, nonzeros, atoms)
    factor = torch.eye(nonzeros, dtype=left.dtype, device=left.device).repeat(count, 1, 1)
    along = left.new_zeros(count, nonzeros)  # the component of each row along q_t
    chosen = torch.zeros(count, nonzeros, dtype=torch.long, device=left.device)
    free = torch.ones_like(left)
    each = torch.arange(count, device=left.device)
    for step in range(nonzeros):
        # The tiny number lets a row without a remainder choose a free atom; otherwise all products would be zero.
        atom = ((left.abs() + torch.finfo(left.dtype).tiny) * free).argmax(1)
        chosen[:, step] = atom
        free[each, atom] = 0
        before = directions[each, :step, atom]  # (count, step)
        # The length is zero for an atom that is a combination of the chosen ones. The clamp keeps the division finite.
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
    """Give each row's new or old coefficients, whichever have the smaller error."""
    left = [(rows - coefficients @ dictionary).square().sum(1) for coefficients in (new, old)]
    return torch.where((left[0] <= left[1])[:, None], new, old)


def update_atoms(rows: Tensor, dictionary: Tensor, coefficients: Tensor) -> None:
    """Fit one atom after the other, with its values that are not zero, to what the other atoms leave. In place."""
    left = rows - coefficients @ dictionary
    for index in range(len(dictionary)):
        users = coefficients[:, index].nonzero().flatten()
        if len(users) == 0:
            dictionary[index] = _normalised(left[left.square().sum(1).argmax()][None], rows)[0]
            continue
        # The rows without all atoms but this one. The best atom and values are their first singular pair, which power
        # iterations approach from the old atom.
        alone = left[users] + coefficients[users, index, None] * dictionary[index]
        atom = dictionary[index]
        for _ in range(POWER_ITERATIONS):
            further = (alone @ atom) @ alone
            length = further.norm()
            if not bool(length > 0):
                break
            atom = further / length
        values = alone @ atom
        # A value of zero would not be found by `nonzero` above the next time, so its row would lose a place.
        values = torch.where(values == 0, torch.finfo(values.dtype).tiny, values)
        dictionary[index] = atom
        coefficients[users, index] = values
        left[users] = alone - values[:, None] * atom


def _normalised(vectors: Tensor, rows: Tensor) -> Tensor:
    # Rows of zeros, or of rounding errors, have no direction. A constant vector takes their place.
    lengths = vectors.norm(dim=1, keepdim=True)
    usable = lengths > torch.finfo(vectors.dtype).eps * rows.norm()
    spare = torch.full_like(vectors, vectors.shape[1] ** -0.5)
    return torch.where(usable, vectors / lengths.clamp(min=torch.finfo(vectors.dtype).tiny), spare)


def _in_weight_space(weight: Tensor, coefficients: Tensor, nonzeros: int) -> Dictionary:
    """Fit the best atoms to coefficients, D = C⁺ W, and scale so that column i of C is as long as atom i."""
    # A row may have fewer values than `nonzeros`. Then `topk` takes zeros too, since all rows store as many values.
    chosen = coefficients.abs().topk(nonzeros, dim=1).indices
    places = torch.zeros_like(coefficients, dtype=torch.bool).scatter(1, chosen, True)
    coefficients, atoms = balance_factors(coefficients, torch.linalg.pinv(coefficients, rtol=1e-10) @ weight)
    return Dictionary(places, coefficients[places].view(len(weight), nonzeros), atoms)
