# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD, exact and randomised."""

import pytest
import torch
from torch import Tensor

from vllm_rsparse.prepare.calibration import factors
from vllm_rsparse.prepare.calibration.factors import truncated_svd


def _decaying(n: int, k: int) -> Tensor:
    """A weight whose singular values fall as 1 / sqrt(i), about as those of LLMs do."""
    rank = min(n, k)
    u = torch.linalg.qr(torch.randn(n, rank)).Q
    v = torch.linalg.qr(torch.randn(k, rank)).Q
    return (u / torch.arange(1, rank + 1).sqrt()) @ v.T


def _best(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize(("n", "k", "rank"), [(60, 47, 5), (47, 60, 47), (1, 9, 1)])
def test_exact_factors_are_the_best_approximation(n: int, k: int, rank: int) -> None:
    weight = torch.randn(n, k)
    result = truncated_svd(weight, rank, seed=0)
    assert result.method == "exact"
    assert (result.u.shape, result.v.shape) == ((n, rank), (rank, k))
    # float32 SVD of an O(1) matrix of this size.
    torch.testing.assert_close(
        (result.u @ result.v).double(), _best(weight, rank), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        result.v @ result.v.T, torch.eye(rank), rtol=0, atol=1e-5
    )
    assert result.residual < 1e-4


def test_randomised_factors_are_nearly_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors, "EXACT_MAX_DIM", 16)
    weight = _decaying(300, 200)
    rank = 10
    result = truncated_svd(weight, rank, seed=0)
    assert result.method == "randomised"
    w = weight.double()
    left = (w - result.u.double() @ result.v.double()).norm()
    # The stated residual bounds how far pairs are off; the error of the approximation,
    # which is what counts, is within 1 part in 10^4 of the best possible.
    assert left <= (w - _best(weight, rank)).norm() * 1.0001
    assert 0 < result.residual < 0.05


def test_the_stated_residual_is_that_of_the_worst_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors, "EXACT_MAX_DIM", 16)
    monkeypatch.setattr(factors, "POWER_ITERATIONS", 0)
    weight = torch.randn(90, 70)  # flat spectrum, no iterations: far from converged
    result = truncated_svd(weight, 3, seed=0)
    sigma = result.u.norm(dim=0)
    expected = ((weight @ result.v.T - result.u).norm(dim=0) / sigma).max()
    assert result.residual == pytest.approx(expected.item(), rel=1e-3)
    assert result.residual > 0.1


def test_the_seed_decides_and_the_global_generator_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors, "EXACT_MAX_DIM", 16)
    weight = torch.randn(80, 90)
    torch.manual_seed(5)
    first = truncated_svd(weight, 4, seed=1)
    drawn = torch.rand(1)
    second = truncated_svd(weight, 4, seed=1)
    other = truncated_svd(weight, 4, seed=2)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v, second.v)
    assert not torch.equal(first.u, other.u)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_a_weight_of_lower_rank_than_asked_for() -> None:
    weight = torch.outer(torch.randn(12), torch.randn(7))
    result = truncated_svd(weight, 3, seed=0)
    torch.testing.assert_close(result.u @ result.v, weight, rtol=0, atol=1e-5)
    assert torch.isfinite(result.u).all()
    assert torch.isfinite(result.v).all()
    zero = truncated_svd(torch.zeros(12, 7), 2, seed=0)
    assert torch.equal(zero.u @ zero.v, torch.zeros(12, 7))
    assert zero.residual == 0
