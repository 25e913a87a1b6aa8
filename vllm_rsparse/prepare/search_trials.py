# SPDX-License-Identifier: Apache-2.0
"""Choices that no estimate makes well, made by trying them on the calibration text.

What gradients say about sharing out ("sensitivity") holds for small errors only, so it
starves the first layers of a deep model; measured errors ("greedy") are of one linear
at a time; at high sparsity neither holds, and shares closer to even ones lose less. The
constant correction is the best for a linear's own output, and yet: it restores what
all tokens have in common but not what tells them apart, and the norms after it shrink
the latter. Perplexity over dense on text kept apart, without factors, loss-gradient
score:

                                         7.9 M, 4 layers       47 M, 16 layers
                                         50%      70%          50%      70%
    gradients                            1.350    4.246        1.047    1.512
    measured errors                      1.362    4.384        -        1.423
    half of each                         1.344    4.078        -        1.396
    half of that, half even              1.373    -            -        1.319
    the same, corrected                  1.371    -            1.062    1.692
    half of each, corrected              1.331    3.786        -        1.909

So each is calibrated as the artifact will be, on ``TRIED_WINDOWS`` windows, and kept if
the loss on them is less: first the way to share out, then half of it even, then the
correction, then the factors.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from .calibrate_layers import run_sparse
from .journal import Journal
from .linears import Linear
from .loss import text_losses
from .planned import Planned
from .recipe import LinearPlan, uniform
from .search_factors import Share, add_factors
from .search_sensitivity import Sensitivity
from .snapshots import Snapshots
from .streaming import StreamedModel

logger = logging.getLogger(__name__)

# Calibration windows that the candidates are tried on.
TRIED_WINDOWS = 8


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
    """Plans, correction and factors, by the loss of what is calibrated with them.

    Args:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        start: the recipe, whose correction is tried if it is true; its plans are not
            used.
        ways: to share out the sparsity, by name.
        found: what ``sensitivities`` found; it left what enters each layer in
            ``snapshots``.
        windows: int64 [samples, tokens].
        sparsity: of the model, factors counted.
        seed: of the randomised methods.
        journal: keeps the losses.
        snapshots: keep the ranks.
    """
    trials = _Trials(model, linears, windows[:TRIED_WINDOWS], seed, journal)
    plain = start.with_correction(False)
    name = trials.least(
        {way: plain.with_plans(dict(share(sparsity))) for way, share in ways.items()}
    )
    share: Share = ways[name]
    evenly = partial(halved, share, partial(uniform, linears, rho=1.0))
    half = plain.with_plans(evenly(sparsity))
    best = plain.with_plans(dict(share(sparsity)))
    if trials.better("half evenly", half):
        share, best = evenly, half
    if start.recipe.correction:
        corrected = best.with_correction(True)
        if trials.better("corrected", corrected):
            best = corrected
    if start.metrics:
        plans = add_factors(
            model, linears, start.first, found, share, sparsity, seed, snapshots,
            best.recipe.correction,
        )  # fmt: skip
        with_factors = best.with_plans(plans)
        if trials.better("with factors", with_factors):
            best = with_factors
    trials.report()
    return replace(best, trials=trials.losses)


class _Trials:
    """Losses of candidates, in the order in which they were tried."""

    def __init__(
        self,
        model: StreamedModel,
        linears: Sequence[Linear],
        windows: Tensor,
        seed: int,
        journal: Journal,
    ) -> None:
        self._model = model
        self._linears = linears
        self._windows = windows
        self._seed = seed
        self._journal = journal
        self.losses: dict[str, float] = {}

    def least(self, candidates: Mapping[str, Planned]) -> str:
        """The name of the one that loses least."""
        for name, planned in candidates.items():
            self._try(name, planned)
        return min(candidates, key=lambda name: self.losses[name])

    def better(self, name: str, planned: Planned) -> bool:
        """Whether it loses less than all that were tried before it."""
        before = min(self.losses.values())
        return self._try(name, planned) < before

    def report(self) -> None:
        """Log what was found."""
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
        logger.info(
            "loss on %d windows of the calibration text, nats: %s; each was kept if it"
            " was the least so far",
            len(self._windows),
            losses,
        )

    def _try(self, name: str, planned: Planned) -> float:
        key = f"loss {name}"
        loss = self._journal.get(key)
        if loss is None:
            hidden = self._model.embed(self._windows)
            run_sparse(self._model, self._linears, planned, hidden, self._seed, name)
            (loss,) = text_losses(self._model, [hidden], self._windows, planned.first)
            self._journal.note({key: loss})
        self.losses[name] = loss
        return loss
