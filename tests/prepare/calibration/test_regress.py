# SPDX-License-Identifier: Apache-2.0
"""Regressed factors against the closed form."""

import pytest
import torch
from torch import Tensor

from vllm_rsparse.prepare.calibration.factors import truncated_svd
from vllm_rsparse.prepare.calibration.regress import directions, regressed

N, K, RANK = 48, 80, 3


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Weight [N, K], covariance [K, K] and metric [N, N], both with some large axes."""
    weight = torch.randn(N, K, dtype=torch.float64)
    sides = []
    for size in (K, N):
        axes = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
        lengths = 0.6 ** torch.arange(size, dtype=torch.float64)
        sides.append(axes @ torch.diag(lengths) @ axes.T)
    return weight, sides[0], sides[1]


def root(matrix: Tensor, power: float) -> Tensor:
    values, axes = torch.linalg.eigh(matrix)
    return axes @ torch.diag(values.clamp_min(0) ** power) @ axes.T


def cost(left: Tensor, covariance: Tensor, metric: Tensor) -> float:
    """E[e^T B e] of e = left d."""
    return torch.trace(metric @ left @ covariance @ left.T).item()


def test_factors_are_the_best_of_their_rank(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    weight, covariance, metric = problem
    factors = regressed(weight, covariance, metric, RANK, seed=0)
    left = weight - factors.u.double() @ factors.v.double()
    # Best approximation in a weighted norm: the truncated SVD between the roots.
    between = root(metric, 0.5) @ weight @ root(covariance, 0.5)
    s = torch.linalg.svdvals(between)
    least = s[RANK:].square().sum().item()
    # Twelve rounds of subspace iteration leave some 0.1%.
    assert cost(left, covariance, metric) == pytest.approx(least, rel=5e-3)
    values, _ = directions(weight, covariance, metric, seed=0)
    torch.testing.assert_close(values[:RANK], s[:RANK].square(), rtol=0.02, atol=0)
    assert factors.residual < 0.1
    plain = truncated_svd(weight.float(), RANK, 0)
    worse = weight - plain.u.double() @ plain.v.double()
    assert cost(worse, covariance, metric) > 1.2 * least


def test_a_metric_of_low_rank_leaves_the_rest_zero(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    weight, covariance, _ = problem
    g = torch.randn(2, N, dtype=torch.float64)
    factors = regressed(weight, covariance, g.T @ g, 5, seed=0)
    assert (factors.u.shape, factors.v.shape) == ((N, 5), (5, K))
    assert (factors.u.norm(dim=0) > 0.5).tolist() == [True] * 2 + [False] * 3
    left = weight - factors.u.double() @ factors.v.double()
    total = cost(weight, covariance, g.T @ g)
    assert cost(left, covariance, g.T @ g) < 1e-6 * total
    none = regressed(weight, covariance, torch.zeros(N, N), 2, seed=0)
    assert not none.u.any()
    assert not none.v.any()
