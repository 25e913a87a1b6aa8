# SPDX-License-Identifier: Apache-2.0
"""One threshold for the whole model, from scores that are given."""

import pytest
import torch
from torch import Tensor

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.search.one_threshold import at_one_threshold, shares_by_bin
from vllm_rsparse.prepare.search.sensitivity import Sensitivity


def counts_of(scores: Tensor) -> Tensor:
    return torch.bincount(scores.view(torch.int32) >> 16, minlength=1 << 16)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_one_threshold_uses_the_whole_budget(sparsity: float) -> None:
    shapes = {"a": (8, 16), "b": (32, 16), "c": (8, 64)}
    linears = [Linear(name, 0, name, shape) for name, shape in shapes.items()]
    scores = {name: 10 ** (i - 1) * torch.rand(4096) for i, name in enumerate(shapes)}
    sensitivity_of = {
        name: Sensitivity(torch.ones(shapes[name][1]), counts_of(scores[name]))
        for name in shapes
    }
    shares = shares_by_bin(linears, sensitivity_of)
    plans = at_one_threshold(linears, shares, sparsity)
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
