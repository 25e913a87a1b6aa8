# SPDX-License-Identifier: Apache-2.0
"""Regressed factors against the closed form, and the ranks that are bought."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_rsparse.artifact.schema import model_sparsity
from vllm_rsparse.prepare.calibration.factors import truncated_svd
from vllm_rsparse.prepare.calibration.regress import (
    directions,
    dropped_covariance,
    regressed,
)
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.recipes import RECIPES

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


@pytest.mark.parametrize("centred", [True, False])
def test_covariance_of_what_is_dropped(centred: bool) -> None:
    x, thresholds = torch.randn(50, 7), torch.rand(7)
    d = torch.where(x.abs() > thresholds, 0.0, x)
    expected = torch.cov(d.T, correction=0) if centred else d.T @ d / 50
    torch.testing.assert_close(
        dropped_covariance(x, thresholds, centred), expected.double(),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("shape", [(384, 384), (128, 384), (4096, 1024)])
def test_plans_with_a_rank(rank: int, shape: tuple[int, int]) -> None:
    plan = LinearPlan.with_rank(0.4, rank, shape)
    assert plan.rank(shape) == rank
    assert plan.keep == pytest.approx(0.4)


def test_factors_that_leave_no_room_are_left_out() -> None:
    assert LinearPlan.with_rank(0.99, 3, (16, 16)) == LinearPlan(1 - 0.99, 1.0)


def test_regressed_factors_are_for_q_and_k(pyllama: Path, tmp_path: Path) -> None:
    # "mixed" would take them only where less is lost, and on so little text it varies.
    recipe = tmp_path / "recipe.json"
    by_gradients = replace(RECIPES["best"], name="g", allocation="sensitivity")
    recipe.write_text(by_gradients.to_json())
    info = prepare(
        PrepareOptions(
            str(pyllama), tmp_path / "out", 0.6, (Path(json.decoder.__file__),),
            samples=4, tokens=128, device="cpu", recipe=str(recipe),
        )
    )  # fmt: skip
    ranks = {name: entry.rank for name, entry in info.linears.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] > 0
    assert all(
        rank == 0
        for name, rank in ranks.items()
        if not name.endswith(("q_proj", "k_proj"))
    )
    # Half a rank of each factor is not spent.
    assert model_sparsity(info.linears) == pytest.approx(0.6, abs=3e-3)
    assert "regressed" in info.provenance["svd"]["largest_residual"]
