# SPDX-License-Identifier: Apache-2.0
"""Allocating a budget to linears, from errors that are given."""

from functools import partial

import pytest
import torch

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.recipe.plan import LinearPlan, mean_of
from vllm_rsparse.prepare.search.greedy import (
    LEVELS,
    allocate,
    in_layers,
    search_windows,
)


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


@pytest.mark.parametrize(
    ("device", "tokens", "count"),
    [
        ("cuda", 64, 4),
        ("cuda", 512, 4),
        ("cuda", 700, 2),
        ("cuda", 4096, 2),
        ("cpu", 256, 4),
        ("cpu", 300, 3),
        ("cpu", 512, 2),
    ],
)
def test_longer_windows_are_measured_in_smaller_number(
    device: str, tokens: int, count: int
) -> None:
    windows = torch.zeros(16, tokens, dtype=torch.int64)
    assert len(search_windows(windows, torch.device(device))) == count
    assert len(search_windows(windows[:1], torch.device(device))) == 1


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


def test_every_layer_gets_the_same_and_the_mean_is_between() -> None:
    linears = [
        Linear(f"model.layers.{layer}.{kind}", layer, kind, (8, 16))
        for layer in range(2)
        for kind in ("self_attn.o_proj", "mlp.up_proj")
    ]
    # Errors that grow with the level, the second linear's of a layer ten times faster.
    errors = {
        linear.name: [(1 + 9 * (i % 2)) * level**2 for level in LEVELS]
        for i, linear in enumerate(linears)
    }

    def first_layer_pays(sparsity: float) -> dict[str, LinearPlan]:
        return {
            linear.name: LinearPlan(2 * sparsity * (linear.layer == 0), 1.0)
            for linear in linears
        }

    greedy = partial(in_layers, linears, errors)
    plans = greedy(0.4)
    for layer in range(2):
        o, up = (
            plans[linear.name].sparsity for linear in linears if linear.layer == layer
        )
        assert o > up
        assert (o + up) / 2 == pytest.approx(0.4)
    mean = mean_of(greedy, first_layer_pays, 0.4)
    for linear in linears:
        other = 0.8 * (linear.layer == 0)
        expected = (plans[linear.name].sparsity + other) / 2
        assert mean[linear.name].sparsity == pytest.approx(expected)
    assert sum(plan.sparsity for plan in mean.values()) / 4 == pytest.approx(0.4)
