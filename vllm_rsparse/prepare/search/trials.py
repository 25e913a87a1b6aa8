# SPDX-License-Identifier: Apache-2.0
"""Choices that no estimate makes well, made by trying them on the calibration text.

What gradients say about sharing out ("sensitivity") holds for small errors only, so it
starves the first layers of a deep model; measured errors ("greedy") are of one linear
at a time; at high sparsity neither holds, and shares closer to even ones lose less. The
constant correction is the best for a linear's own output, and harms deep models all
the same (docs/recipes.md has what it does by kind). Nor do factors always pay. KL
divergence in nats on the text of the trials, with factors but in the last row:

    parameters, layers             7.9 M, 4         117 M, 10        47 M, 16
                                   50%     70%      50%     70%      70%
    sensitivity                    0.275   1.330    0.038   0.488    0.472
      corrected                    0.265   1.220    0.045   0.806    0.845
    greedy                         0.290   1.550    0.030   0.226    0.454
      corrected                    0.274   1.343    0.032   0.336    0.766
    half of each                   0.276   1.407    0.033   0.300    0.410
      corrected                    0.270   1.247    0.037   0.482    0.738
    the best so far, half evenly   0.306   1.385    0.030   0.198    0.322
    the best so far, no factors    0.293   1.390    0.031   0.213    0.297

So each is calibrated as the artifact will be, on ``TRIED_TOKENS`` tokens, and the one
is taken that stays nearest to the dense model's predictions.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.layers import run_sparse
from vllm_rsparse.prepare.calibration.loss import divergence
from vllm_rsparse.prepare.recipe.plan import LinearPlan, uniform
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.search.factors import Share, find_ranks, with_factors
from vllm_rsparse.prepare.search.sensitivity import Sensitivity
from vllm_rsparse.prepare.store.journal import Journal
from vllm_rsparse.prepare.store.snapshots import Snapshots

logger = logging.getLogger(__name__)

# Calibration tokens that the candidates are tried on, in whole windows. On 4096 the two
# best of the 7.9 M model at 60% (0.470 both) came in the wrong order.
TRIED_TOKENS = 8192


def halved(one: Share, other: Share, sparsity: float) -> dict[str, LinearPlan]:
    """Plans without factors that give a linear the mean of what the two give it."""
    first, second = one(sparsity), other(sparsity)
    return {
        name: LinearPlan((first[name].sparsity + second[name].sparsity) / 2, 1.0)
        for name in first
    }


def choose(
    model: StreamedModel,
    linears: Sequence[Linear],
    start: Planned,
    ways: Mapping[str, Share],
    found: Mapping[str, Sensitivity],
    windows: Tensor,
    sparsity: float,
    seed: int,
    journal: Journal,
    snapshots: Snapshots,
) -> Planned:
    """Plans, correction and factors, by KL divergence of what is calibrated with them.

    Args:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        start: the recipe, whose correction is tried if it is true; its plans are not
            used.
        ways: to share out the sparsity, by name; one at least.
        found: what ``sensitivities`` found; it left what enters each layer, and what
            leaves the last one, in ``snapshots``.
        windows: int64 [samples, tokens].
        sparsity: of the model, factors counted.
        seed: of the randomised methods.
        journal: keeps the divergences.
        snapshots: keep the ranks.
    """
    tried = math.ceil(TRIED_TOKENS / windows.shape[1])
    layers = len({one.layer for one in linears})
    dense = snapshots.get(f"entering.{layers}")[0]["hidden"][:tried]
    trials = _Trials(model, linears, windows[:tried], dense, seed, journal)
    options = [start.with_correction(False)]
    if start.recipe.correction:
        options.append(start.with_correction(True))
    # Ranks hardly depend on how the sparsity is shared out: the last way's serve all.
    plans = list(ways.values())[-1](sparsity)
    ranks: dict[bool, dict[str, int]] = {False: {}, True: {}}
    if start.metrics:
        for option in options:
            corrected = option.recipe.correction
            ranks[corrected] = find_ranks(
                model, linears, start.first, found, plans, seed, snapshots, corrected
            )
    for name, share in ways.items():
        for option in options:
            corrected = option.recipe.correction
            trials.add(
                f"{name}, corrected" if corrected else name,
                option.with_plans(
                    with_factors(linears, ranks[corrected], share, sparsity)
                ),
                share,
            )
    best, share = trials.best
    corrected = best.recipe.correction
    evenly = partial(halved, share, partial(uniform, linears, rho=1.0))
    trials.add(
        "half evenly",
        best.with_plans(with_factors(linears, ranks[corrected], evenly, sparsity)),
        evenly,
    )
    best, share = trials.best
    if any(ranks[corrected].values()):
        trials.add("without factors", best.with_plans(dict(share(sparsity))), share)
    best, _ = trials.best
    trials.report()
    return replace(best, trials=trials.divergences)


class _Trials:
    """Divergences of candidates, in the order in which they were tried."""

    def __init__(
        self,
        model: StreamedModel,
        linears: Sequence[Linear],
        windows: Tensor,
        dense: Tensor,
        seed: int,
        journal: Journal,
    ) -> None:
        self._model = model
        self._linears = linears
        self._windows = windows
        self._dense = dense.to(model.device)
        self._seed = seed
        self._journal = journal
        self._candidates: dict[str, tuple[Planned, Share]] = {}
        self.divergences: dict[str, float] = {}

    def add(self, name: str, planned: Planned, share: Share) -> None:
        """Try a candidate."""
        key = f"divergence {name}"
        known = self._journal.get(key)
        if known is None:
            hidden = self._model.embed(self._windows)
            run_sparse(self._model, self._linears, planned, hidden, self._seed, name)
            known = divergence(self._model, hidden, self._dense, planned.first)
            self._journal.note({key: known})
        self.divergences[name] = known
        self._candidates[name] = planned, share

    @property
    def best(self) -> tuple[Planned, Share]:
        """The candidate with the least, the first of equal ones; how it shares out."""
        name = min(self.divergences, key=lambda name: self.divergences[name])
        return self._candidates[name]

    def report(self) -> None:
        """Log what was found."""
        logger.info(
            "KL(dense || sparse) on %d windows of the calibration text, nats: %s;"
            " the least is taken",
            len(self._windows),
            ", ".join(f"{name} {kl:.4f}" for name, kl in self.divergences.items()),
        )
