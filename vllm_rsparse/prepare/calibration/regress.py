# SPDX-License-Identifier: Apache-2.0
"""Factors that approximate the dropped part, weighted by its effect on the loss.

With d the dropped part of the input, an error e = W d - U V d in a linear's output
costs, to second order, e^T B e, where B = E[g g^T] and g is the gradient of the loss by
that output. Over all U V of rank r, E[e^T B e] is least for the projection

    U V = Q Q^T B W,    Q^T B Q = 1,    S B Q = Q diag(l),    S = W E[d d^T] W^T

on the r eigenvectors with the largest eigenvalues l, and each eigenvalue is the cost
that its direction removes. With a constant correction, d is taken minus its mean.
"""

import torch
from torch import Tensor

from vllm_rsparse.prepare.calibration.factors import Factors

ITERATIONS = 12
OVERSAMPLING = 16
# Number of directions, as a share of the smaller side; the largest rank that paid was
# 13 of 384 (bundled model, first q_proj at 60%).
WIDEST = 1 / 8


def directions(
    weight: Tensor,
    covariance: Tensor,
    metric: Tensor,
    seed: int,
    wanted: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The costliest directions of the lost output, by subspace iteration.

    Args:
        weight: [N, K], any floating dtype.
        covariance: [K, K] of the dropped part.
        metric: [N, N], E[g g^T].
        seed: of the starting vectors.
        wanted: how many are used; the search is ``OVERSAMPLING`` wider.

    Returns:
        Eigenvalues [R] in descending order, and Q [N, R], both float64; R is
        ``WIDEST`` of the smaller side, or less where fewer are wanted or the metric has
        a smaller rank.
    """
    w, b = weight.double(), metric.double()
    s = w @ covariance.double() @ w.mT
    size = max(1, int(WIDEST * min(weight.shape)))
    if wanted is not None:
        size = min(max(size, wanted), wanted + OVERSAMPLING)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(w), size, generator=generator, dtype=torch.float64)
    q = _orthonormal(q.to(w.device), b)
    for _ in range(ITERATIONS):
        q = _orthonormal(s @ (b @ q), b)
    bq = b @ q
    values, vectors = torch.linalg.eigh(bq.mT @ s @ bq)
    return values.flip(0).clamp_min(0), q @ vectors.flip(1)


def regressed(
    weight: Tensor, covariance: Tensor, metric: Tensor, rank: int, seed: int
) -> Factors:
    """Factors of at most rank r, arguments as in ``directions``.

    Ranks that the metric or the search does not fill are zero.
    """
    values, q = directions(weight, covariance, metric, seed, rank)
    w, b = weight.double(), metric.double()
    u = torch.zeros(len(weight), rank, dtype=torch.float64, device=weight.device)
    filled = min(rank, q.shape[1])
    u[:, :filled] = q[:, :filled]
    v = u.mT @ b @ w
    # How far the worst direction used is from an eigenvector.
    image = w @ (covariance.double() @ (w.mT @ (b @ u[:, :filled])))
    off = torch.linalg.vector_norm(image - u[:, :filled] * values[:filled], dim=0)
    off /= torch.linalg.vector_norm(image, dim=0).clamp_min(1e-300)
    # Columns of Q are as long as the metric is small; half precision has no room.
    lengths = torch.linalg.vector_norm(u, dim=0).clamp_min(1e-30)
    u, v = u / lengths, v * lengths[:, None]
    residual = off.max().item() if filled else 0.0
    return Factors(u.float(), v.float().contiguous(), "regressed", residual)


def _orthonormal(y: Tensor, b: Tensor) -> Tensor:
    """A basis of y's columns with Q^T B Q = 1, without directions in B's null space."""
    if y.shape[1] == 0:
        return y
    y = y / torch.linalg.vector_norm(y, dim=0).clamp_min(1e-300)
    gram = y.mT @ b @ y
    # Where the columns are far from dependent; ten times faster than eigenvectors.
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if (failed == 0) & (diagonal.min() > 1e-4 * diagonal.max()):
        return torch.linalg.solve_triangular(factor, y.mT, upper=False).mT
    values, vectors = torch.linalg.eigh(gram)
    seen = values > values[-1] * 1e-12
    if not seen.any() or values[-1] <= 0:
        return y[:, :0]
    return y @ (vectors[:, seen] / values[seen].sqrt())
