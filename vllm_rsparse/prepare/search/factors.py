# SPDX-License-Identifier: Apache-2.0
"""Ranks of the factors that ``best`` gives to q and k, at the price of its channels.

Where the sparsity is shared out by one constant, an element of the weights buys

    t^2 / N    with t the score at the threshold

of loss. A direction of the lost output costs N + K elements and takes away its
eigenvalue (see ``regress``): it is worth having where that is more. This looks at the
inputs of q and k only, which are had from what enters each layer, as ``sensitivities``
kept it; then the channels are shared out again on what the factors leave of the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.propagate import stage_input, stages
from vllm_rsparse.prepare.calibration.regress import directions, dropped_covariance
from vllm_rsparse.prepare.calibration.thresholds import (
    channel_thresholds,
    score_threshold,
)
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.search.sensitivity import Sensitivity
from vllm_rsparse.prepare.store.snapshots import Snapshots

# Sparsity -> plans without factors.
Share = Callable[[float], Mapping[str, LinearPlan]]


def find_ranks(
    model: StreamedModel,
    linears: Sequence[Linear],
    first: int,
    found: Mapping[str, Sensitivity],
    plans: Mapping[str, LinearPlan],
    seed: int,
    snapshots: Snapshots,
    correction: bool,
) -> dict[str, int]:
    """Rank of the factors that each linear's dropped part is worth; 0 for most.

    Args:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        first: leading positions of each window that stay dense and do not count.
        found: what ``sensitivities`` found.
        plans: without factors; they say what is dropped.
        seed: of the subspace iteration.
        snapshots: where ``sensitivities`` kept what enters each layer; the ranks of a
            layer are kept too.
        correction: whether a constant makes up for the mean of what is dropped.
    """
    ranks: dict[str, int] = {}
    way = "corrected" if correction else "plain"
    layers = [(i, list(group)) for i, group in groupby(linears, lambda one: one.layer)]
    for position, (index, members) in enumerate(tqdm(layers, "factors", unit="layer")):
        kept = f"ranks.{way}.{position}"
        if kept not in snapshots:
            hidden = snapshots.get(f"entering.{position}")[0]["hidden"]
            with model.layer(index) as layer:
                snapshots.put(
                    kept,
                    {},
                    _layer_ranks(
                        model, members, layer, hidden.to(model.device), first, found,
                        plans, seed, correction,
                    ),
                )  # fmt: skip
        ranks |= snapshots.get(kept)[1]
    return ranks


def with_factors(
    linears: Sequence[Linear], ranks: Mapping[str, int], share: Share, sparsity: float
) -> dict[str, LinearPlan]:
    """Plans of the same sparsity, with factors paid for by keeping fewer channels.

    Args:
        linears: all linears that take part.
        ranks: from ``find_ranks``; linears that are not in it have none.
        share: sparsity -> plans without factors.
        sparsity: of the model, factors counted.
    """
    dense = sum(one.shape[0] * one.shape[1] for one in linears)
    factors = sum(ranks.get(one.name, 0) * sum(one.shape) for one in linears)
    shares = share(min(sparsity + factors / dense, 1.0))
    return {
        one.name: LinearPlan.with_rank(
            shares[one.name].keep, ranks.get(one.name, 0), one.shape
        )
        for one in linears
    }


def _layer_ranks(
    model: StreamedModel,
    members: Sequence[Linear],
    layer: nn.Module,
    hidden: Tensor,
    first: int,
    found: Mapping[str, Sensitivity],
    plans: Mapping[str, LinearPlan],
    seed: int,
    correction: bool,
) -> dict[str, int]:
    ranks = {}
    for stage in stages(members):
        wanted = [one for one in stage if one.factors_pay]
        if not wanted:
            continue
        x = stage_input(model, stage[0], layer, hidden, first)
        for linear in wanted:
            weight = model.checkpoint.read([linear.weight])[linear.weight]
            keep = plans[linear.name].keep
            ranks[linear.name] = _rank(
                weight.to(x.device), x, found[linear.name], keep, seed, correction
            )
    return ranks


@torch.no_grad()
def _rank(
    weight: Tensor,
    x: Tensor,
    found: Sensitivity,
    keep: float,
    seed: int,
    correction: bool,
) -> int:
    if found.metric is None:
        return 0
    n, k = weight.shape
    scale, metric = found.scale.to(x.device), found.metric.to(x.device)
    score = score_threshold(x, scale, keep)
    if score <= 0:  # nothing is dropped
        return 0
    thresholds = channel_thresholds(score, scale)
    covariance = dropped_covariance(x, thresholds, correction)
    values, _ = directions(weight, covariance, metric, seed)
    # Eigenvalues are of mean squares, scores of another mean: bring them to one scale.
    w = weight.double()
    squares = ((metric.double() @ w) * w).sum(0).clamp_min(0)
    some = scale > 0
    unit = (squares[some].sqrt() / scale[some].double()).median() ** 2
    price = unit * score**2 / n
    return int((values / (n + k) > price).sum())
