# SPDX-License-Identifier: Apache-2.0
"""Ranks of the factors of q and k, at the price of their channels.

Where the sparsity is allocated by one constant, an element of the weights buys

    t^2 / N    with t the score at the threshold

of loss. A direction of the lost output costs N + K elements and removes its eigenvalue
(see ``regress``) from the loss: it is worth its bytes if that is more. Only the inputs
of q and k are examined, computed from the layer inputs that the sensitivity pass kept.
Then the channels are allocated again within the budget that the factors leave.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.calibration.dropped import count_dropped
from vllm_rsparse.prepare.calibration.propagate import stage_input, stages
from vllm_rsparse.prepare.calibration.regress import directions
from vllm_rsparse.prepare.calibration.thresholds import (
    channel_thresholds,
    score_threshold,
)
from vllm_rsparse.prepare.recipe.plan import Allocation, LinearPlan
from vllm_rsparse.prepare.run import LayerLinears, Run
from vllm_rsparse.prepare.search.scores import Scored
from vllm_rsparse.prepare.search.sensitivity import Sensitivity

# Where ranks are kept, by whether there is a correction.
_STAGES = {False: "ranks.plain", True: "ranks.corrected"}


def find_ranks(
    run: Run,
    scored: Scored,
    plans: Mapping[str, LinearPlan],
    corrections: Sequence[bool],
) -> dict[bool, dict[str, int]]:
    """Rank of the factors that are worth their bytes, per linear; 0 for most.

    The ranks of a layer are kept in the run's store.

    Args:
        run: the model and its calibration text.
        scored: with the sensitivity pass, whose states are used.
        plans: without factors; they say what is dropped.
        corrections: whether a constant replaces the mean of what is dropped; the ranks
            depend on it, and are found for each.
    """
    ranks: dict[bool, dict[str, int]] = {corrected: {} for corrected in corrections}
    buyer = _Buyer(run, scored.gradients.linears, plans)
    states = scored.gradients.states
    for position, layer in enumerate(tqdm(run.layers, "factors", unit="layer")):
        keys = {corrected: run.key(_STAGES[corrected], position) for corrected in ranks}
        known = {corrected: run.store.recall(key) for corrected, key in keys.items()}
        if None in known.values():
            hidden = states.entering(position).to(run.model.device)
            with run.model.layer(layer.index) as module:
                known = buyer.layer_ranks(layer, module, hidden, corrections)
            run.store.record({keys[corrected]: known[corrected] for corrected in known})
        for corrected, found in known.items():
            ranks[corrected] |= found
    return ranks


def with_factors(
    linears: Sequence[Linear],
    ranks: Mapping[str, int],
    allocation: Allocation,
    sparsity: float,
) -> dict[str, LinearPlan]:
    """Plans of the same sparsity, with factors paid for by keeping fewer channels.

    Args:
        linears: all linears that take part.
        ranks: from ``find_ranks``; linears that are not in it have none.
        allocation: of the channels.
        sparsity: of the model, factors counted.
    """
    dense = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    factors = sum(ranks.get(linear.name, 0) * sum(linear.shape) for linear in linears)
    plans = allocation(min(sparsity + factors / dense, 1.0))
    return {
        linear.name: LinearPlan.with_rank(
            plans[linear.name].keep, ranks.get(linear.name, 0), linear.shape
        )
        for linear in linears
    }


@dataclass(frozen=True)
class _Buyer:
    """Finds the ranks that are worth their bytes."""

    run: Run
    sensitivity_of: Mapping[str, Sensitivity]
    plans: Mapping[str, LinearPlan]

    def layer_ranks(
        self,
        layer: LayerLinears,
        module: nn.Module,
        hidden: Tensor,
        corrections: Sequence[bool],
    ) -> dict[bool, dict[str, int]]:
        """Ranks of the linears of a materialised layer, from the layer's input."""
        model = self.run.model
        ranks: dict[bool, dict[str, int]] = {corrected: {} for corrected in corrections}
        for stage in stages(layer):
            wanted = [linear for linear in stage if linear.factors_pay]
            if not wanted:
                continue
            x = stage_input(model, stage[0], module, hidden, self.run.dense_prefix)
            for linear in wanted:
                weight = model.weight(linear)
                found = self._ranks(linear, weight.to(x.device), x, corrections)
                for corrected, rank in found.items():
                    ranks[corrected][linear.name] = rank
        return ranks

    @torch.no_grad()
    def _ranks(
        self, linear: Linear, weight: Tensor, x: Tensor, corrections: Sequence[bool]
    ) -> dict[bool, int]:
        sensitivity = self.sensitivity_of[linear.name]
        if sensitivity.metric is None:
            return dict.fromkeys(corrections, 0)
        n, k = weight.shape
        scale, metric = sensitivity.scale.to(x.device), sensitivity.metric.to(x.device)
        score = score_threshold(x, scale, self.plans[linear.name].keep)
        if score <= 0:  # nothing is dropped
            return dict.fromkeys(corrections, 0)
        thresholds = channel_thresholds(score, scale)
        dropped = count_dropped(x, thresholds, outer=True)
        # Eigenvalues are mean squares, scores another mean: bring both to one
        # scale.
        w = weight.double()
        squares = ((metric.double() @ w) * w).sum(0).clamp_min(0)
        scored = scale > 0
        unit = (squares[scored].sqrt() / scale[scored].double()).median() ** 2
        price = unit * score**2 / n
        ranks = {}
        for corrected in corrections:
            covariance = dropped.covariance(centred=corrected)
            values, _ = directions(weight, covariance, metric, self.run.seed)
            ranks[corrected] = int((values / (n + k) > price).sum())
        return ranks
