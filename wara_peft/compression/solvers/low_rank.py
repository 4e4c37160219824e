"""Best low-rank approximations of a weight in a metric. This file knows nothing of models.

A metric is a pair of matrices, G = S Sᵀ, (n, n), and H = Tᵀ T, (m, m). In it the error of an approximation Ŵ of W,
(m, n), is ‖T (W − Ŵ) S‖²_F. If G is the second moment of the inputs and H = I, this is the mean squared error of the
output, E‖(W − Ŵ) x‖².
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Metric:
    """The weights G and H of an error; see above.

    Attributes:
        inputs: G, (n, n), or only its diagonal, (n,), if G is diagonal; None is I. G may be singular.
        outputs: H, (m, m), which is regular; None is I.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def error(self, difference: Tensor) -> Tensor:
        """Give ‖T (W − Ŵ) S‖²_F for a difference W − Ŵ, (m, n), in float64."""
        # ‖T D S‖²_F is the sum over all entries of (H D) · (D G), which needs no roots.
        d = difference.double()
        right: Tensor = d if self.outputs is None else self.outputs.double() @ d
        found: Tensor = (right * _times(d, self.inputs)).sum()
        return found


class Factors(NamedTuple):
    """Ŵ = up @ down, with factors (m, r) and (r, n) in float64, and its error.

    Column i of `up` is as long as row i of `down`. `lost` is the error of Ŵ, and `energy` the error of 0.
    """

    up: Tensor
    down: Tensor
    lost: float
    energy: float


def energies(weight: Tensor, metric: Metric) -> Tensor:
    """Give σ_i² of T W S, (min(m, n),), the largest first: what the i-th unit of rank takes off the error."""
    values: Tensor = torch.linalg.eigvalsh(_gram(weight.double(), metric)[0])
    return values.flip(0).clamp(min=0)


def low_rank(weight: Tensor, rank: int, metric: Metric) -> Factors:
    """Give the approximation of rank r with the least error: ‖T (W − Ŵ) S‖²_F = Σ_{i>r} σ_i² of T W S.

    If U holds the first r left singular vectors of T W S, then Ŵ = (T⁻¹ U)(Uᵀ T W). This needs no inverse of S, so G
    may be singular (dead inputs, fewer samples than inputs) or close to it. U comes from the eigenvectors of
    T W G Wᵀ Tᵀ if m ≤ n, and else of Sᵀ Wᵀ H W S, the smaller of the two. If T W S has a lower rank than r, the spare
    rank goes to the nearest approximation of the rest of T W, so that full rank gives W.

    Args:
        weight: W, (m, n).
        rank: r, from 1 to min(m, n).
        metric: the metric, on the weight's device.

    Source: the identity is theorem 3.2 of SVD-LLM, arXiv 2403.07378. The form without inverses is DRONE's and others'.
    """
    weight = weight.double()
    gram, root = _gram(weight, metric)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
    chol = None if metric.outputs is None else torch.linalg.cholesky(metric.outputs.double())
    target = weight if chol is None else chol.T @ weight  # T W
    # Eigenvalues below the rounding error of the largest one are noise, and so are their vectors.
    resolved = min(rank, int((values > values[0] * len(gram) * 4 * torch.finfo(torch.float64).eps).sum()))
    basis = vectors if len(gram) == len(weight) else target @ (vectors if root is None else _times_root(root, vectors))
    if resolved < rank:
        kept = torch.linalg.qr(basis[:, :resolved]).Q
        rest = target - kept @ (kept.T @ target)
        basis = torch.cat((kept, _left_vectors(rest, rank - resolved)), 1)
    # Eigenvectors are orthonormal, but products with them and vectors of the rest are not.
    if resolved < rank or len(gram) != len(weight):
        basis = torch.linalg.qr(basis).Q
    up = basis if chol is None else torch.linalg.solve_triangular(chol.T, basis, upper=True)
    up, down = balance_factors(up, basis.T @ target)
    return Factors(up, down, float(values[rank:].sum()), float(values.sum()))


def _gram(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor | None]:
    """Give the smaller one of A Aᵀ and Aᵀ A for A = T W S, and S if the second one was made with it."""
    m, n = weight.shape
    if m <= n:
        gram = _times(weight, metric.inputs) @ weight.T
        if metric.outputs is not None:
            chol = torch.linalg.cholesky(metric.outputs.double())
            gram = chol.T @ gram @ chol
        return (gram + gram.T) / 2, None
    root = None if metric.inputs is None else root_of(metric.inputs)
    half = weight if root is None else (_times_root(root, weight.T, transposed=True)).T
    right = half if metric.outputs is None else metric.outputs.double() @ half
    gram = half.T @ right
    return (gram + gram.T) / 2, root


def root_of(moment: Tensor) -> Tensor:
    """Give S with S Sᵀ = G, in float64: the Cholesky factor, or Q Λ^½ if there is none; for a diagonal its root."""
    moment = moment.double()
    if moment.dim() == 1:
        return moment.clamp(min=0).sqrt()
    factor, failed = torch.linalg.cholesky_ex(moment)
    if not bool(failed) and bool(factor.isfinite().all()):
        return factor  # type: ignore[no-any-return]
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt()  # type: ignore[no-any-return]


def _times(weight: Tensor, moment: Tensor | None) -> Tensor:
    """Give W G."""
    if moment is None:
        return weight
    return weight * moment.double() if moment.dim() == 1 else weight @ moment.double()


def _times_root(root: Tensor, matrix: Tensor, transposed: bool = False) -> Tensor:
    """Give S M, or Sᵀ M if `transposed`."""
    if root.dim() == 1:
        return root[:, None] * matrix
    return (root.T if transposed else root) @ matrix


def _left_vectors(matrix: Tensor, count: int) -> Tensor:
    """Give vectors with the span of the first `count` left singular vectors, if their singular values are not zero."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)[1]
    vectors = vectors.flip(1)[:, :count]
    return vectors if is_wide else matrix @ vectors


def balance_factors(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Scale two factors so that column i of one is as long as row i of the other. The product stays the same."""
    lengths = up.norm(dim=0), down.norm(dim=1)
    ratio = torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[1] / lengths[0], 1.0).sqrt()
    return up * ratio, down / ratio[:, None]
