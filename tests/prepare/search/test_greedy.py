# SPDX-License-Identifier: Apache-2.0
"""Sharing a budget out among linears, from errors and scores that are given."""

from functools import partial

import pytest
import torch
from torch import Tensor

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.search.greedy import LEVELS, allocate, share_in_layers
from vllm_rsparse.prepare.search.sensitivity import Sensitivity, share_out
from vllm_rsparse.prepare.search.trials import halved


def counts_of(scores: Tensor) -> Tensor:
    return torch.bincount(scores.view(torch.int32) >> 16, minlength=1 << 16)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_sharing_out_uses_one_threshold_and_the_whole_budget(sparsity: float) -> None:
    shapes = {"a": (8, 16), "b": (32, 16), "c": (8, 64)}
    linears = [Linear(name, 0, name, shape) for name, shape in shapes.items()]
    scores = {name: 10 ** (i - 1) * torch.rand(4096) for i, name in enumerate(shapes)}
    found = {
        name: Sensitivity(torch.ones(shapes[name][1]), counts_of(scores[name]))
        for name in shapes
    }
    plans = share_out(linears, found, sparsity)
    sizes = {name: n * k for name, (n, k) in shapes.items()}
    total = sum(plans[name].sparsity * size for name, size in sizes.items())
    assert total / sum(sizes.values()) == pytest.approx(sparsity, abs=1e-9)
    assert plans["a"].sparsity >= plans["b"].sparsity >= plans["c"].sparsity
    # Below a common threshold lies the planned fraction of each; a bin is 1% wide.
    if sparsity > 0:
        threshold = scores["c"].quantile(plans["c"].sparsity).item()
        for name in ("a", "b"):
            below = (scores[name] <= threshold).float().mean().item()
            assert plans[name].sparsity == pytest.approx(below, abs=0.05)


def test_allocation_takes_the_cheapest_bytes_first() -> None:
    errors = {
        "cheap": [0.1 * level for level in LEVELS],
        "dear": [10.0 * level**2 for level in LEVELS],
    }
    shares = allocate(errors, {"cheap": 100, "dear": 300}, 0.225)
    assert shares == pytest.approx({"cheap": 0.9, "dear": 0.0})
    shares = allocate(errors, {"cheap": 100, "dear": 300}, 0.5)
    assert shares["cheap"] == pytest.approx(0.9)
    assert 100 * shares["cheap"] + 300 * shares["dear"] == pytest.approx(200)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_allocation_meets_the_budget(sparsity: float) -> None:
    # Not convex: a linear that is worse at 30% than at 40%, through noise.
    errors = {
        "a": [0, 1, 5, 4, 6, 9, 13, 20, 40],
        "b": [0, 2, 3, 5, 8, 13, 21, 34, 55],
    }
    sizes = {"a": 7, "b": 5}
    shares = allocate(errors, sizes, sparsity)
    total = sum(shares[name] * size for name, size in sizes.items())
    assert total == pytest.approx(sparsity * 12)
    assert all(0 <= share < 1 for share in shares.values())


def test_greedy_shares_out_in_layers_and_halved_is_the_mean() -> None:
    linears = [
        Linear(f"model.layers.{layer}.{kind}", layer, kind, (8, 16))
        for layer in range(2)
        for kind in ("self_attn.o_proj", "mlp.up_proj")
    ]
    # Errors that grow with the level, the second linear's of a layer ten times faster.
    errors = {
        one.name: [(1 + 9 * (i % 2)) * level**2 for level in LEVELS]
        for i, one in enumerate(linears)
    }

    def first_layer_pays(sparsity: float) -> dict[str, LinearPlan]:
        return {
            one.name: LinearPlan(2 * sparsity * (one.layer == 0), 1.0)
            for one in linears
        }

    in_layers = partial(share_in_layers, linears, errors)
    plans = in_layers(0.4)
    for layer in range(2):
        o, up = (plans[one.name].sparsity for one in linears if one.layer == layer)
        assert o > up
        assert (o + up) / 2 == pytest.approx(0.4)
    mean = halved(in_layers, first_layer_pays, 0.4)
    for one in linears:
        other = 0.8 * (one.layer == 0)
        expected = (plans[one.name].sparsity + other) / 2
        assert mean[one.name].sparsity == pytest.approx(expected)
    assert sum(plan.sparsity for plan in mean.values()) / 4 == pytest.approx(0.4)
